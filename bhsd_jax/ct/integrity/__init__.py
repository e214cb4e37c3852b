"""What lies in a data set and what is wrong with it, in tables and in words."""
