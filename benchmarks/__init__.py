"""Measurements that the project commits: accuracy of the method, machine, tables of the README."""
