"""The engine: `client` on the HTTP side of the socket; process, loop, scheduler, blocks and prefix on the other."""
