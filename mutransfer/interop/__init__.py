"""Other tools' ways of saying which axes grow, read and written."""
