"""From a config and a plan to the network, the objective and what stands around them."""
