//! The TUN device: whole super-packets in both directions.
//!
//! Every frame read or written starts with the ten bytes of a `virtio_net_hdr`, so that packets
//! arrive as the kernel holds them: up to 64 KiB, not yet segmented, their checksum not yet
//! computed (Linux `Documentation/networking/tuntap.rst`, `IFF_VNET_HDR` and `TUNSETOFFLOAD`).
//!
//! The device is not persistent: it goes, with its routes and per-device sysctls, when the last
//! queue is closed, however the process ends.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};

use tun_rs::{DeviceBuilder, SyncDevice};

use crate::io::privileges;
pub use crate::packet::vnet::VNET_HDR_LEN;

/// Largest frame: a `virtio_net_hdr` and an IP packet of 65,535 bytes.
pub const MAX_FRAME: usize = VNET_HDR_LEN + 65_535;

/// The TUN driver's device node.
pub const DEVICE: &str = "/dev/net/tun";

/// Why the TUN could not be made.
#[derive(Debug, thiserror::Error)]
pub enum TunError {
    /// No right to create network devices.
    #[error(
        "no permission to create the TUN interface {0}: {remedy}",
        remedy = privileges::remedy("CAP_NET_ADMIN", "--cap-add NET_ADMIN")
    )]
    Permission(String),
    /// The kernel has no TUN driver, or this container hides it.
    #[error(
        "this system has no /dev/net/tun: load the module with `modprobe tun`, \
         or pass the device into the container"
    )]
    NoDriver,
    /// Somebody else's interface has the name.
    #[error("interface {0} exists already: stop what made it, or choose another name with --tun")]
    Exists(String),
    /// Anything else the kernel said.
    #[error("cannot create the TUN interface {0}: {1}")]
    Other(String, #[source] io::Error),
}

/// What the device can do, found out when it is made.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TunFeatures {
    /// UDP super-packets (Linux 6.2 on).
    pub uso: bool,
}

/// Writes to refuse as kernels do that cannot take them, to test the fallbacks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TunOptions {
    /// Coalesced packets are taken; otherwise each is refused with `EINVAL`.
    pub coalesced: bool,
    /// Packets of more than 17 pages (`MAX_SKB_FRAGS`) are taken; otherwise each is refused with
    /// `EMSGSIZE`, as by Linux 6.3 to 6.5.
    pub long: bool,
}

impl Default for TunOptions {
    fn default() -> Self {
        Self {
            coalesced: true,
            long: true,
        }
    }
}

/// Longest packet that is taken without [`TunOptions::long`], in bytes.
const LONG: usize = 17 * 4_096;

/// One queue of the TUN device.
pub struct TunQueue {
    queue: OwnedFd,
    options: TunOptions,
}

impl TunQueue {
    /// Makes the device `name` with `queues` queues, down and without addresses.
    ///
    /// The caller has made sure that no interface of that name exists: with more than one queue
    /// the kernel would silently join an existing one.
    pub fn create(
        name: &str,
        queues: usize,
        options: TunOptions,
    ) -> Result<(Vec<Self>, TunFeatures), TunError> {
        // tun-rs would make the device node. Where there is none, somebody took it away.
        if !std::path::Path::new(DEVICE).exists() {
            return Err(TunError::NoDriver);
        }
        let first = DeviceBuilder::new()
            .name(name)
            .enable(false)
            .offload(true)
            .multi_queue(queues > 1)
            .build_sync()
            .map_err(|error| explain(name, error))?;
        let features = TunFeatures {
            uso: first.udp_gso(),
        };
        let mut all = vec![first];
        while all.len() < queues {
            let next = all[0].try_clone().map_err(|error| explain(name, error))?;
            all.push(next);
        }
        for queue in &all {
            queue
                .set_nonblocking(true)
                .map_err(|error| explain(name, error))?;
        }
        // The library sets a queue up, and would adopt none with these offloads. To read and write
        // one takes no more than the descriptor.
        let queue = |device: SyncDevice| {
            #[expect(unsafe_code, reason = "the library gives a bare number")]
            // SAFETY: the device has just given the descriptor away.
            let queue = unsafe { OwnedFd::from_raw_fd(device.into_raw_fd()) };
            Self { queue, options }
        };
        Ok((all.into_iter().map(queue).collect(), features))
    }

    /// A queue that another daemon made, with the features that it found.
    pub fn adopt(queue: OwnedFd, options: TunOptions) -> Self {
        Self { queue, options }
    }

    /// A second handle to the same queue.
    ///
    /// # Errors
    /// If there is no descriptor left.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self::adopt(self.queue.try_clone()?, self.options))
    }

    /// Reads one frame into `frame` ([`MAX_FRAME`] long); `WouldBlock` when none waits.
    pub fn recv(&self, frame: &mut [u8]) -> io::Result<usize> {
        Ok(rustix::io::read(&self.queue, frame)?)
    }

    /// Writes one frame, gathered from `parts`, the first of which starts with the
    /// `virtio_net_hdr`.
    pub fn send(&self, parts: &[IoSlice<'_>]) -> io::Result<()> {
        rustix::io::writev(&self.queue, parts)?;
        Ok(())
    }

    /// Like [`send`](Self::send), for a packet that was coalesced. [`TunOptions`] may have it
    /// refused.
    pub fn send_coalesced(&self, parts: &[IoSlice<'_>]) -> io::Result<()> {
        if !self.options.coalesced {
            return refused(libc::EINVAL);
        }
        if !self.options.long && length(parts) - VNET_HDR_LEN > LONG {
            return refused(libc::EMSGSIZE);
        }
        self.send(parts)
    }
}

impl AsFd for TunQueue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.queue.as_fd()
    }
}

fn length(parts: &[IoSlice<'_>]) -> usize {
    parts.iter().map(|part| part.len()).sum()
}

fn refused(errno: i32) -> io::Result<()> {
    Err(io::Error::from_raw_os_error(errno))
}

fn explain(name: &str, error: io::Error) -> TunError {
    match error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => TunError::Permission(name.into()),
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => TunError::NoDriver,
        Some(libc::EBUSY | libc::EEXIST) => TunError::Exists(name.into()),
        _ => TunError::Other(name.into(), error),
    }
}
