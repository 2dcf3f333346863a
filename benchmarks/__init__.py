"""How fast the operators are, beside what others do: cases, timing, rows, tables and plots."""
