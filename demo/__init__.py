"""The web page on which people talk to the model, and the files of a Space. Only `app` needs Gradio."""
