"""One run on many devices and nodes: meshes, sharding, exchange, agreement between ranks."""
