"""The Gradio app: tabs beside one persistent viewer, and the HTTP API."""
