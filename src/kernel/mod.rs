//! Everything that the daemon asks of the kernel's network configuration.
pub mod netlink;

#[cfg(test)]
mod testing;
