//! Maps and programs that another process makes for this one.
//!
//! A daemon that runs may make none ([`daemon::confine`](crate::daemon::confine)). The process that
//! does it for the daemon runs the very code that wants them, and hands over the descriptors in the
//! order in which they came. The daemon runs that code, too, and is given them in this order.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::os::fd::OwnedFd;

thread_local! {
    static SUPPLY: RefCell<Supply> = const { RefCell::new(Supply::Kernel) };
}

/// Where descriptors come from.
enum Supply {
    /// From the kernel.
    Kernel,
    /// From there, and a copy of each is kept.
    Recorded(Vec<OwnedFd>),
    /// From another process, as long as there are any.
    Given(VecDeque<OwnedFd>),
}

/// Does something, and returns copies of what it has had made.
pub fn recorded<T>(make: impl FnOnce() -> T) -> (T, Vec<OwnedFd>) {
    let (result, supply) = with(Supply::Recorded(Vec::new()), make);
    match supply {
        Supply::Recorded(made) => (result, made),
        Supply::Kernel | Supply::Given(_) => (result, Vec::new()),
    }
}

/// Does something with what another process has had made for it, and returns how much of that is
/// left over: with other programs than were wanted there, one would be taken for another.
pub fn given<T>(made: Vec<OwnedFd>, make: impl FnOnce() -> T) -> (T, usize) {
    let (result, supply) = with(Supply::Given(made.into()), make);
    match supply {
        Supply::Given(left) => (result, left.len()),
        Supply::Kernel | Supply::Recorded(_) => (result, 0),
    }
}

fn with<T>(supply: Supply, make: impl FnOnce() -> T) -> (T, Supply) {
    SUPPLY.set(supply);
    let result = make();
    (result, SUPPLY.replace(Supply::Kernel))
}

/// The next descriptor from another process, or what `make` has of the kernel.
pub(super) fn next<E>(make: impl FnOnce() -> Result<OwnedFd, E>) -> Result<OwnedFd, E> {
    let given = SUPPLY.with_borrow_mut(|supply| match supply {
        Supply::Given(made) => made.pop_front(),
        Supply::Kernel | Supply::Recorded(_) => None,
    });
    if let Some(given) = given {
        return Ok(given);
    }
    let made = make()?;
    SUPPLY.with_borrow_mut(|supply| {
        // Without a copy the other side finds one too few, and says so.
        if let (Supply::Recorded(all), Ok(copy)) = (supply, made.try_clone()) {
            all.push(copy);
        }
    });
    Ok(made)
}

#[cfg(test)]
mod tests {
    use rustix::thread::CapabilitySet;

    use super::*;
    use crate::kernel::bpf::test_run::run;
    use crate::kernel::bpf::{Assembler, BpfError, Map, MapKind, Program, Reg, Shape, Size, Words};
    use crate::kernel::testing::{in_fresh_namespace, keep_only};
    use std::os::fd::AsFd;

    /// A program that returns a word, and a map beside it.
    fn make() -> Result<(Words, Map, OwnedFd), BpfError> {
        let words = Words::new("ipmoved_test", 1)?;
        let map = Map::new(Shape {
            kind: MapKind::Hash,
            name: "ipmoved_test",
            key_size: 4,
            value_size: 4,
            max_entries: 7,
        })?;
        let mut asm = Assembler::new();
        asm.load_address(Reg::R1, words.as_fd(), 0);
        asm.load(Size::W, Reg::R0, Reg::R1, 0);
        asm.exit();
        let program: Program = asm.finish("ipmoved_test")?;
        let loaded = program.load()?;
        Ok((words, map, loaded))
    }

    #[test]
    fn what_one_process_made_another_uses_without_privileges() {
        in_fresh_namespace(|| {
            let (first, made) = recorded(make);
            let (words, map, _) = first.expect("run the tests as root");
            assert_eq!(made.len(), 3);
            map.insert(&[1; 4], &[2; 4]).unwrap();
            keep_only(CapabilitySet::NET_ADMIN);
            assert!(make().is_err(), "none can be made");
            let (supplied, left) = given(made, make);
            let (other, again, program) = supplied.unwrap();
            assert_eq!(left, 0);
            assert!(make().is_err(), "only so many were given");
            let mut value = [0; 4];
            assert!(again.read(&[1; 4], &mut value));
            assert_eq!(value, [2; 4]);
            other.set(0, 7);
            assert_eq!(words.get(0), 7, "they are the same words");
            drop((words, map));
            assert_eq!(run(program.as_fd(), &[0; 64]).verdict, 7);
        });
    }
}
