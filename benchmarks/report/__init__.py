"""Results of the suite for readers: tables, plots, one HTML page, and the tables of the README."""
