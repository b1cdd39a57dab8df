//! A stream of numbered datagrams that a UDP service sends back, to find those that are lost or
//! doubled.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use ipmoved::lab::traffic::Target;
use ipmoved::lab::{Client, LabError};

use crate::stage::Result;

/// How long to wait for the last echoes.
const LAST: Duration = Duration::from_millis(1_500);

/// A stream that flows until [`stop`](Self::stop).
pub(crate) struct Stream {
    stop: Arc<AtomicBool>,
    sender: JoinHandle<u64>,
    receiver: JoinHandle<Echoes>,
    heard: Arc<AtomicBool>,
}

/// The result of a stream.
#[derive(Debug)]
pub(crate) struct Echoes {
    pub(crate) sent: u64,
    pub(crate) back: HashSet<u64>,
    pub(crate) twice: u64,
    /// The longest time without an echo.
    pub(crate) gap: Duration,
}

impl Echoes {
    /// Expects that every datagram came back, and none twice.
    pub(crate) fn complete(&self) -> Result {
        let lost = self.sent - self.back.len() as u64;
        if lost == 0 && self.twice == 0 {
            return Ok(());
        }
        let missing: Vec<u64> = (0..self.sent)
            .filter(|number| !self.back.contains(number))
            .take(20)
            .collect();
        Err(LabError::unexpected(format!(
            "of {} datagrams {lost} were lost ({missing:?} …) and {} came twice",
            self.sent, self.twice
        )))
    }
}

impl Stream {
    /// Sends `length` bytes every `pace`.
    pub(crate) fn start(
        client: Client<'_>,
        to: impl Into<Target>,
        length: usize,
        pace: Duration,
    ) -> Result<Self> {
        let socket = client.udp_socket(to)?;
        let back = socket
            .try_clone()
            .map_err(|error| LabError::unexpected(format!("no second handle: {error}")))?;
        let stop = Arc::new(AtomicBool::new(false));
        let done = Arc::new(AtomicBool::new(false));
        let heard = Arc::new(AtomicBool::new(false));
        let (stopped, ended, hears) = (Arc::clone(&stop), Arc::clone(&done), Arc::clone(&heard));
        let sender = thread::spawn(move || {
            let mut number = 0u64;
            let started = Instant::now();
            while !stopped.load(Relaxed) {
                let mut datagram = vec![0; length.max(8)];
                datagram[..8].copy_from_slice(&number.to_le_bytes());
                if socket.send(&datagram).is_ok() {
                    number += 1;
                }
                let due = pace * number as u32;
                thread::sleep(due.saturating_sub(started.elapsed()));
            }
            thread::sleep(LAST);
            ended.store(true, Relaxed);
            number
        });
        let receiver = thread::spawn(move || {
            let mut echoes = Echoes {
                sent: 0,
                back: HashSet::new(),
                twice: 0,
                gap: Duration::ZERO,
            };
            // The timeout matters only at the end.
            let _ = back.set_read_timeout(Some(Duration::from_millis(100)));
            let mut buffer = vec![0; 65_536];
            let mut last = Instant::now();
            while !done.load(Relaxed) {
                if let Ok(8..) = back.recv(&mut buffer) {
                    let now = Instant::now();
                    echoes.gap = echoes.gap.max(now - last);
                    last = now;
                    hears.store(true, Relaxed);
                    let number = u64::from_le_bytes([
                        buffer[0], buffer[1], buffer[2], buffer[3], buffer[4], buffer[5],
                        buffer[6], buffer[7],
                    ]);
                    echoes.twice += u64::from(!echoes.back.insert(number));
                }
            }
            echoes
        });
        Ok(Self {
            stop,
            sender,
            receiver,
            heard,
        })
    }

    /// Whether an echo came since the last call.
    pub(crate) fn heard_again(&self) -> bool {
        self.heard.swap(false, Relaxed)
    }

    /// Ends the stream, waits for the last echoes, and returns the result.
    pub(crate) fn stop(self) -> Result<Echoes> {
        self.stop.store(true, Relaxed);
        let died = |what: &str| LabError::unexpected(format!("the {what} of a stream died"));
        let sent = self.sender.join().map_err(|_| died("sender"))?;
        let echoes = self.receiver.join().map_err(|_| died("receiver"))?;
        Ok(Echoes { sent, ..echoes })
    }
}
