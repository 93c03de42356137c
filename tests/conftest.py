"""Eight CPU devices, so that sharded computations run on any machine."""

import jax

jax.config.update("jax_num_cpu_devices", 8)
