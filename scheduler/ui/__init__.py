"""What people see: the terminal, the tables, the pictures behind both."""
