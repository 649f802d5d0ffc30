"""Jobs, sessions and the studio that joins them to the pipeline: what a front end needs, without a front end."""
