"""How the network runs fast on a CPU: native module, fused click, bounded cache. Never changes what is computed."""
