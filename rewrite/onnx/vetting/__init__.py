"""Judge a graph by its protobuf: what it would cost, before native code sees it."""
