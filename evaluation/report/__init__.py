"""A report of all result files, as HTML, Markdown and LaTeX."""
