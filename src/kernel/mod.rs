//! Everything that the daemon asks of the kernel's network configuration.
pub mod bpf;
pub mod netlink;

#[cfg(test)]
mod testing;
