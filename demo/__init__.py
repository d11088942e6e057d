"""The web page for talking to the model, and the files of a Space. Only `app` and `serving` need Gradio."""
