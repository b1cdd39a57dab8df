//! Values by number, and lists through them: mechanism without policy.
//!
//! By hand, and neither `slab` nor a map of lists: a million flows are to cost no pause and little
//! memory beside what they are. So it grows by chunks and never copies what it has (a `Vec` would
//! stop the lane at every doubling), a number is four bytes, and the links of the list that a value
//! is in lie beside it.

/// Values allocated together: 30 KiB of flows.
const CHUNK: usize = 256;

/// Stands for no number: so many values would take 200 GiB.
const NIL: u32 = u32::MAX;

/// Values by number. Numbers of removed values are given out again. It never moves a value, and it
/// keeps what a flood made it grow to for the next one.
pub(super) struct Slab<T> {
    chunks: Vec<Box<[Slot<T>; CHUNK]>>,
    used: u32,
    /// The first of the used slots that are free again. The `next` of each is the next of them.
    free: u32,
}

/// A value and its neighbours in the list it is in.
#[derive(Clone, Copy)]
struct Slot<T> {
    value: T,
    prev: u32,
    next: u32,
}

/// The first and the last of some values of one slab.
#[derive(Clone, Copy, Debug)]
pub(super) struct List {
    head: u32,
    tail: u32,
}

impl<T> Default for Slab<T> {
    fn default() -> Self {
        Self {
            chunks: Vec::new(),
            used: 0,
            free: NIL,
        }
    }
}

impl<T: Copy> Slab<T> {
    #[inline]
    pub(super) fn get(&self, at: u32) -> &T {
        &self.slot(at).value
    }

    #[inline]
    pub(super) fn get_mut(&mut self, at: u32) -> &mut T {
        &mut self.slot_mut(at).value
    }

    /// Adds a value, which is in no list yet, and returns its number.
    pub(super) fn add(&mut self, value: T) -> u32 {
        let slot = Slot {
            value,
            prev: NIL,
            next: NIL,
        };
        if self.free != NIL {
            let at = self.free;
            self.free = self.slot(at).next;
            *self.slot_mut(at) = slot;
            return at;
        }
        let at = self.used;
        self.used += 1;
        if (at as usize).is_multiple_of(CHUNK) {
            self.chunks.push(Box::new([slot; CHUNK]));
        } else {
            *self.slot_mut(at) = slot;
        }
        at
    }

    /// How many numbers were given out. Each but those of removed values has a value.
    pub(super) fn used(&self) -> u32 {
        self.used
    }

    /// Removes a value that is in no list. Who asks for its number still gets what it was.
    pub(super) fn free(&mut self, at: u32) {
        let free = self.free;
        self.slot_mut(at).next = free;
        self.free = at;
    }

    /// Appends a value that is in no list.
    pub(super) fn append(&mut self, list: &mut List, at: u32) {
        let tail = list.tail;
        let slot = self.slot_mut(at);
        slot.next = NIL;
        slot.prev = tail;
        if tail == NIL {
            list.head = at;
        } else {
            self.slot_mut(tail).next = at;
        }
        list.tail = at;
    }

    /// Takes a value out of the list that it is in.
    pub(super) fn unlink(&mut self, list: &mut List, at: u32) {
        let slot = self.slot(at);
        let (prev, next) = (slot.prev, slot.next);
        if prev == NIL {
            list.head = next;
        } else {
            self.slot_mut(prev).next = next;
        }
        if next == NIL {
            list.tail = prev;
        } else {
            self.slot_mut(next).prev = prev;
        }
    }

    /// The numbers of a list's values, in its order.
    pub(super) fn members(&self, list: &List) -> impl Iterator<Item = u32> {
        let next = |&at: &u32| Some(self.slot(at).next).filter(|&next| next != NIL);
        std::iter::successors(list.first(), next)
    }

    /// Bytes that are allocated.
    pub(super) fn allocated(&self) -> usize {
        self.chunks.capacity() * size_of::<Box<[Slot<T>; CHUNK]>>()
            + self.chunks.len() * size_of::<[Slot<T>; CHUNK]>()
    }

    #[inline]
    fn slot(&self, at: u32) -> &Slot<T> {
        &self.chunks[at as usize / CHUNK][at as usize % CHUNK]
    }

    #[inline]
    fn slot_mut(&mut self, at: u32) -> &mut Slot<T> {
        &mut self.chunks[at as usize / CHUNK][at as usize % CHUNK]
    }
}

impl List {
    pub(super) const EMPTY: Self = Self {
        head: NIL,
        tail: NIL,
    };

    /// The number of the value that was appended first.
    #[inline]
    pub(super) fn first(&self) -> Option<u32> {
        (self.head != NIL).then_some(self.head)
    }
}

/// Bytes that a value takes with its links.
#[cfg(test)]
pub(super) const fn slot_size<T>() -> usize {
    size_of::<Slot<T>>()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::VecDeque;

    proptest! {
        /// Two lists through one slab are queues from whose middle values can be taken.
        #[test]
        fn lists_behave_as_queues(
            steps in prop::collection::vec(
                (0u8..3, any::<bool>(), any::<prop::sample::Index>()),
                0..600,
            ),
        ) {
            let mut slab = Slab::default();
            let mut lists = [List::EMPTY; 2];
            let mut wanted = [VecDeque::new(), VecDeque::new()];
            for (value, (step, which, index)) in steps.into_iter().enumerate() {
                let which = usize::from(which);
                let (list, queue) = (&mut lists[which], &mut wanted[which]);
                if step > 0 || queue.is_empty() {
                    let at = slab.add(value);
                    slab.append(list, at);
                    queue.push_back((at, value));
                } else {
                    let (at, value) = queue.remove(index.index(queue.len())).unwrap();
                    prop_assert_eq!(*slab.get(at), value);
                    slab.unlink(list, at);
                    slab.free(at);
                }
            }
            for (mut list, queue) in lists.into_iter().zip(wanted) {
                for (at, value) in queue {
                    prop_assert_eq!(list.first(), Some(at));
                    prop_assert_eq!(*slab.get(at), value);
                    slab.unlink(&mut list, at);
                }
                prop_assert_eq!(list.first(), None);
            }
        }
    }
}
