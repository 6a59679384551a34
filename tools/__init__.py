"""Programs for those who develop the project; nothing of the packages imports them."""
