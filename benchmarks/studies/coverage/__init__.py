"""Which models can be cut, by this compiler and by its peers, each judged by an oracle that shares no code with it."""
