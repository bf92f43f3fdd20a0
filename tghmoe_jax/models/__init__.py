"""The vision tower with TGH-MoE, routers, connector, decoder and generation, as pure functions of arrays."""
