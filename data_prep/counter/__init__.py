"""Counter-emotional preference pairs: generation, selection and audit."""
