"""Which weights and operations become one."""
