//! Programs that are in the kernel already.
//!
//! Once it has started, the daemon may attach programs but not load any (`daemon::confine`). An
//! interface that appears later gets a program that was loaded at the start. So whatever may be
//! wanted later has to be loaded then, and must not contain what only becomes known later.

use std::cell::RefCell;
use std::os::fd::OwnedFd;

use super::{BpfError, Program};

/// The programs that a plan has loaded. The kernel keeps them as long as this.
#[derive(Debug, Default)]
pub struct Loaded(RefCell<Vec<(Program, OwnedFd)>>);

impl Loaded {
    /// The program in the kernel: one that was loaded before, if it has the same name and
    /// instructions, else a new one. The instructions name maps by descriptor, so the maps have to
    /// stay open as long as this.
    ///
    /// # Errors
    /// If the kernel refuses the program, as it refuses every new one after the start.
    pub fn get(&self, program: &Program) -> Result<OwnedFd, BpfError> {
        let mut loaded = self.0.borrow_mut();
        let known = loaded.iter().find(|(known, _)| known == program);
        let fd = match known {
            Some((_, fd)) => fd.try_clone(),
            None => {
                let fd = program.load()?;
                let again = fd.try_clone();
                loaded.push((program.clone(), fd));
                again
            }
        };
        fd.map_err(|source| BpfError::Descriptor {
            name: program.name(),
            source,
        })
    }
}

#[cfg(test)]
mod tests {
    use rustix::thread::CapabilitySet;

    use super::*;
    use crate::kernel::bpf::{Assembler, Reg};
    use crate::kernel::testing::{in_fresh_namespace, keep_only};

    fn returning(verdict: i32) -> Program {
        let mut asm = Assembler::new();
        asm.mov(Reg::R0, verdict);
        asm.exit();
        asm.finish("ipmoved_test").unwrap()
    }

    #[test]
    fn what_was_loaded_before_is_there_without_privileges() {
        in_fresh_namespace(|| {
            let loaded = Loaded::default();
            loaded.get(&returning(0)).unwrap();
            keep_only(CapabilitySet::NET_ADMIN);
            loaded.get(&returning(0)).unwrap();
            assert!(matches!(loaded.get(&returning(1)), Err(BpfError::Denied)));
        });
    }
}
