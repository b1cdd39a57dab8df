//! Everything that the daemon asks of the kernel's network configuration.
pub mod bpf;
pub mod netlink;
pub mod programs;

#[cfg(test)]
mod testing;
