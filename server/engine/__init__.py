"""The engine: `client` on the HTTP side of the socket; `process`, `loop`, `scheduler` and `blocks` on the other."""
