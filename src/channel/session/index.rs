//! The numbers under which sessions receive datagrams, unique over all peers of a daemon.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};

use super::{Entropy, NoEntropy};

/// The session indexes that are in use, over all peers of a daemon.
#[derive(Clone, Default, Debug)]
pub struct SessionIndexes(Arc<Mutex<BTreeSet<u32>>>);

impl SessionIndexes {
    /// Draws an index that is not in use. It is free again when the returned value is dropped.
    pub(crate) fn draw(&self, entropy: &Entropy) -> Result<SessionIndex, NoEntropy> {
        let mut used = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let mut bytes = [0; 4];
            entropy.fill(&mut bytes)?;
            let value = u32::from_le_bytes(bytes);
            if used.insert(value) {
                return Ok(SessionIndex {
                    value,
                    used: self.clone(),
                });
            }
        }
    }

    /// Takes this index; `None` if it is in use.
    pub(crate) fn claim(&self, value: u32) -> Option<SessionIndex> {
        let mut used = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        used.insert(value).then(|| SessionIndex {
            value,
            used: self.clone(),
        })
    }

    /// How many are in use.
    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).len()
    }
}

/// A drawn index.
#[derive(Debug)]
pub(crate) struct SessionIndex {
    /// The number that the peer puts into its datagrams.
    pub(crate) value: u32,
    used: SessionIndexes,
}

impl Drop for SessionIndex {
    fn drop(&mut self) {
        self.used
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&self.value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn indexes_are_unique_while_in_use() {
        let indexes = SessionIndexes::default();
        let mut draws = [5u32, 5, 5, 6].into_iter();
        let entropy = Entropy::of(move |bytes| {
            bytes.copy_from_slice(&draws.next().unwrap().to_le_bytes());
        });
        let first = indexes.draw(&entropy).unwrap();
        let second = indexes.draw(&entropy).unwrap();
        assert_eq!((first.value, second.value, indexes.len()), (5, 6, 2));
        drop(first);
        assert_eq!(indexes.len(), 1);
    }
}
