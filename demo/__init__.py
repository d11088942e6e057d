"""The web page for talking to the model, and the files of a Space. `app` and `space` need the extra `demo`."""
