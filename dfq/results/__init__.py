"""What a run has to show: accuracies, tables, pictures, files."""
