//! A tiny eBPF assembler and the few `bpf(2)` calls that the capture and steering programs need.
//!
//! Owns instructions, labels, maps and program loading; what the programs do is the business of
//! [`programs`](super::programs). No BTF, no loops, no relocations: what is assembled here loads on
//! kernels from 5.10 on. Instruction set: `Documentation/bpf/standardization/instruction-set.rst`.
#![allow(unsafe_code, reason = "bpf(2) has no safe wrapper")]

use std::ffi::c_int;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, setrlimit};

/// The licence the kernel is told. No helper that is used needs a GPL-compatible one.
const LICENCE: &std::ffi::CStr = c"Dual MIT/GPL";

/// Room for the verifier's words about a refused program; what does not fit is lost at the end.
const VERIFIER_LOG_BYTES: usize = 1 << 20;

/// Longest name of a program or map that the kernel keeps (`BPF_OBJ_NAME_LEN` less the final NUL).
const MAX_NAME: usize = 15;

/// A register. R0 is a result, R1–R5 are arguments and lost in calls and packet loads, R6–R9 are
/// kept, R10 is the stack frame's end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[allow(missing_docs, reason = "they are their names")]
pub enum Reg {
    R0,
    R1,
    R2,
    R3,
    R4,
    R5,
    R6,
    R7,
    R8,
    R9,
    R10,
}

/// Width of a memory access.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Size {
    /// One byte.
    B,
    /// Two bytes.
    H,
    /// Four bytes.
    W,
    /// Eight bytes.
    Dw,
}

impl Size {
    fn bits(self) -> u8 {
        match self {
            Self::W => 0x00,
            Self::H => 0x08,
            Self::B => 0x10,
            Self::Dw => 0x18,
        }
    }
}

/// Arithmetic on 64 bits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[allow(missing_docs, reason = "they are their names")]
pub enum Alu {
    Add,
    Sub,
    Or,
    And,
    Lsh,
    Rsh,
    Mov,
}

impl Alu {
    fn bits(self) -> u8 {
        match self {
            Self::Add => 0x00,
            Self::Sub => 0x10,
            Self::Or => 0x40,
            Self::And => 0x50,
            Self::Lsh => 0x60,
            Self::Rsh => 0x70,
            Self::Mov => 0xb0,
        }
    }
}

/// An unsigned comparison of the lower 32 bits, or of all 64 for [`Assembler::jump_if_wide`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum If {
    /// Equal.
    Eq,
    /// Not equal.
    Ne,
    /// Above.
    Gt,
    /// Above or equal.
    Ge,
    /// Below.
    Lt,
    /// Below or equal.
    Le,
    /// Some bit in common.
    Set,
}

impl If {
    fn bits(self) -> u8 {
        match self {
            Self::Eq => 0x10,
            Self::Gt => 0x20,
            Self::Ge => 0x30,
            Self::Set => 0x40,
            Self::Ne => 0x50,
            Self::Lt => 0xa0,
            Self::Le => 0xb0,
        }
    }
}

/// The second operand of an instruction.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Operand {
    /// A register.
    Reg(Reg),
    /// A constant, sign-extended where 64 bits are wanted.
    Imm(i32),
}

impl From<Reg> for Operand {
    fn from(reg: Reg) -> Self {
        Self::Reg(reg)
    }
}

impl From<i32> for Operand {
    fn from(imm: i32) -> Self {
        Self::Imm(imm)
    }
}

impl From<u32> for Operand {
    fn from(imm: u32) -> Self {
        Self::Imm(imm.cast_signed())
    }
}

/// Functions of the kernel that programs may call, all there in 5.10 and for any licence.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(i32)]
pub enum Helper {
    /// `(map, key) → value or 0`.
    MapLookup = 1,
    /// `(map, key, value, flags)`.
    MapUpdate = 2,
    /// `(map, key)`.
    MapDelete = 3,
    /// `() → nanoseconds since boot, suspend excluded`.
    KtimeGetNs = 5,
    /// `(skb, offset, from, length, flags) → 0 or an error`.
    SkbStoreBytes = 9,
    /// `(ifindex, flags) → verdict`.
    Redirect = 23,
    /// `(skb, offset, to, length) → 0 or an error`.
    SkbLoadBytes = 26,
    /// `(skb, packet type) → 0 or an error`.
    SkbChangeType = 32,
    /// `(skb, bytes, flags) → 0 or an error`.
    SkbChangeHead = 43,
    /// `(ifindex, params, params length, flags) → verdict`.
    RedirectNeigh = 152,
}

/// A place in the code to jump to; bound once, after the last jump or before.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[must_use]
pub struct Label(usize);

#[derive(Clone, Copy)]
struct Instruction {
    opcode: u8,
    dst: u8,
    src: u8,
    offset: i16,
    imm: i32,
}

impl Instruction {
    /// `struct bpf_insn`, in which the order of the two register nibbles follows the byte order.
    fn encode(self) -> [u8; 8] {
        let regs = if cfg!(target_endian = "little") {
            self.src << 4 | self.dst
        } else {
            self.dst << 4 | self.src
        };
        let [o0, o1] = self.offset.to_ne_bytes();
        let [i0, i1, i2, i3] = self.imm.to_ne_bytes();
        [self.opcode, regs, o0, o1, i0, i1, i2, i3]
    }
}

/// Writes a program, instruction by instruction.
#[derive(Default)]
pub struct Assembler {
    code: Vec<Instruction>,
    labels: Vec<Option<usize>>,
    jumps: Vec<(usize, Label)>,
}

impl Assembler {
    const LD: u8 = 0x00;
    const LDX: u8 = 0x01;
    const ST: u8 = 0x02;
    const STX: u8 = 0x03;
    const JMP: u8 = 0x05;
    const JMP32: u8 = 0x06;
    const ALU64: u8 = 0x07;
    const FROM_REG: u8 = 0x08;
    const MODE_ABS: u8 = 0x20;
    const MODE_IND: u8 = 0x40;
    const MODE_MEM: u8 = 0x60;

    /// An empty program.
    pub fn new() -> Self {
        Self::default()
    }

    /// A label that is not bound yet.
    pub fn label(&mut self) -> Label {
        self.labels.push(None);
        Label(self.labels.len() - 1)
    }

    /// Binds a label to the next instruction.
    pub fn bind(&mut self, label: Label) {
        debug_assert!(self.labels[label.0].is_none(), "bound twice");
        self.labels[label.0] = Some(self.code.len());
    }

    /// `dst = dst op operand`.
    pub fn alu(&mut self, op: Alu, dst: Reg, operand: impl Into<Operand>) {
        self.with_operand(Self::ALU64 | op.bits(), dst, operand.into());
    }

    /// `dst = operand`.
    pub fn mov(&mut self, dst: Reg, operand: impl Into<Operand>) {
        self.alu(Alu::Mov, dst, operand);
    }

    /// `dst = imm`, all 64 bits.
    pub fn mov_wide(&mut self, dst: Reg, imm: u64) {
        self.load_wide(dst, 0, imm);
    }

    /// `dst = map`; the program keeps the map when `map` is closed.
    pub fn load_map(&mut self, dst: Reg, map: BorrowedFd<'_>) {
        const PSEUDO_MAP_FD: u8 = 1;
        self.load_wide(dst, PSEUDO_MAP_FD, map.as_raw_fd() as u64);
    }

    /// `R0 =` the packet's bytes at `offset`, in host order; R6 is the context. Past the packet's
    /// end the program ends with verdict 0: the packet passes.
    pub fn load_packet(&mut self, size: Size, offset: u32) {
        let opcode = Self::LD | Self::MODE_ABS | size.bits();
        self.push(opcode, 0, 0, 0, offset.cast_signed());
    }

    /// As [`Self::load_packet`], at `base + offset`.
    pub fn load_packet_at(&mut self, size: Size, base: Reg, offset: u32) {
        let opcode = Self::LD | Self::MODE_IND | size.bits();
        self.push(opcode, 0, base as u8, 0, offset.cast_signed());
    }

    /// `dst = *(base + offset)`.
    pub fn load(&mut self, size: Size, dst: Reg, base: Reg, offset: i16) {
        let opcode = Self::LDX | Self::MODE_MEM | size.bits();
        self.push(opcode, dst as u8, base as u8, offset, 0);
    }

    /// `*(base + offset) = operand`.
    pub fn store(&mut self, size: Size, base: Reg, offset: i16, operand: impl Into<Operand>) {
        let (class, src, imm) = match operand.into() {
            Operand::Reg(src) => (Self::STX, src as u8, 0),
            Operand::Imm(imm) => (Self::ST, 0, imm),
        };
        self.push(
            class | Self::MODE_MEM | size.bits(),
            base as u8,
            src,
            offset,
            imm,
        );
    }

    /// Jumps.
    pub fn jump(&mut self, to: Label) {
        self.jumps.push((self.code.len(), to));
        self.push(Self::JMP, 0, 0, 0, 0);
    }

    /// Jumps if the lower 32 bits compare so.
    pub fn jump_if(&mut self, dst: Reg, cond: If, operand: impl Into<Operand>, to: Label) {
        self.jumps.push((self.code.len(), to));
        self.with_operand(Self::JMP32 | cond.bits(), dst, operand.into());
    }

    /// Jumps if all 64 bits compare so.
    pub fn jump_if_wide(&mut self, dst: Reg, cond: If, operand: impl Into<Operand>, to: Label) {
        self.jumps.push((self.code.len(), to));
        self.with_operand(Self::JMP | cond.bits(), dst, operand.into());
    }

    /// Calls a function of the kernel: arguments in R1–R5, result in R0.
    pub fn call(&mut self, helper: Helper) {
        self.push(Self::JMP | 0x80, 0, 0, 0, helper as i32);
    }

    /// Ends the program with the verdict in R0.
    pub fn exit(&mut self) {
        self.push(Self::JMP | 0x90, 0, 0, 0, 0);
    }

    /// Resolves the jumps, and leaves out what no path reaches (which the verifier would refuse), so
    /// that a generator may write down parts that nothing happens to lead to.
    ///
    /// # Errors
    /// If a jump is too far for its 16 bits, or goes to a label that was never bound.
    pub fn finish(self, name: &'static str) -> Result<Program, BpfError> {
        debug_assert!(name.len() <= MAX_NAME, "the kernel would cut it");
        let mut targets = vec![None; self.code.len()];
        for &(at, label) in &self.jumps {
            targets[at] = Some(self.labels[label.0].ok_or(BpfError::Jump { name })?);
        }
        let reached = self.reached(&targets);
        // Where each instruction ends up.
        let mut moved_to = Vec::with_capacity(self.code.len());
        let mut kept = 0_usize;
        for &reached in &reached {
            moved_to.push(kept);
            kept += usize::from(reached);
        }
        let mut code = Vec::with_capacity(kept);
        for (at, mut instruction) in self.code.into_iter().enumerate() {
            if !reached[at] {
                continue;
            }
            if let Some(target) = targets[at] {
                let offset = moved_to[target] as i64 - code.len() as i64 - 1;
                instruction.offset = i16::try_from(offset).map_err(|_| BpfError::Jump { name })?;
            }
            code.push(instruction.encode());
        }
        Ok(Program { name, code })
    }

    /// Which instructions some path from the first one leads to.
    fn reached(&self, targets: &[Option<usize>]) -> Vec<bool> {
        const JUMP: u8 = Assembler::JMP;
        const EXIT: u8 = Assembler::JMP | 0x90;
        let mut reached = vec![false; self.code.len()];
        let mut paths = vec![0];
        while let Some(mut at) = paths.pop() {
            while at < reached.len() && !reached[at] {
                reached[at] = true;
                paths.extend(targets[at]);
                match self.code[at].opcode {
                    JUMP | EXIT => break,
                    _ => at += 1,
                }
            }
        }
        reached
    }

    fn with_operand(&mut self, opcode: u8, dst: Reg, operand: Operand) {
        match operand {
            Operand::Reg(src) => self.push(opcode | Self::FROM_REG, dst as u8, src as u8, 0, 0),
            Operand::Imm(imm) => self.push(opcode, dst as u8, 0, 0, imm),
        }
    }

    fn load_wide(&mut self, dst: Reg, src: u8, imm: u64) {
        let opcode = Self::LD | Size::Dw.bits();
        self.push(opcode, dst as u8, src, 0, imm as i32);
        self.push(0, 0, 0, 0, (imm >> 32) as i32);
    }

    fn push(&mut self, opcode: u8, dst: u8, src: u8, offset: i16, imm: i32) {
        self.code.push(Instruction {
            opcode,
            dst,
            src,
            offset,
            imm,
        });
    }
}

/// An assembled program of type `SCHED_CLS`.
#[derive(Clone, Debug)]
pub struct Program {
    name: &'static str,
    code: Vec<[u8; 8]>,
}

impl Program {
    /// Its name, which the kernel shows in `tc filter` and `bpftool prog`.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Number of instructions.
    #[allow(
        clippy::len_without_is_empty,
        reason = "an empty program does not load"
    )]
    pub fn len(&self) -> usize {
        self.code.len()
    }

    /// Loads it into the kernel, which keeps it as long as the descriptor or a filter refers to it.
    ///
    /// # Errors
    /// If the kernel refuses; the verifier's last words are in the error.
    pub fn load(&self) -> Result<OwnedFd, BpfError> {
        let errno = match with_memlock_raised(|| self.load_once(&mut [])) {
            Ok(fd) => return Ok(fd),
            Err(errno @ (Errno::PERM | Errno::NOSYS)) => return Err(BpfError::from(errno)),
            Err(errno) => errno,
        };
        // The verifier speaks only when asked, and asking makes loading slower: so a second time.
        let mut log = vec![0; VERIFIER_LOG_BYTES];
        if let Ok(fd) = self.load_once(&mut log) {
            return Ok(fd);
        }
        let end = log.iter().position(|&b| b == 0).unwrap_or(log.len());
        let log = String::from_utf8_lossy(&log[..end]);
        let words = log
            .lines()
            .rev()
            .find(|line| !line.is_empty() && !line.starts_with("processed "));
        Err(BpfError::Load {
            name: self.name,
            errno,
            words: words.unwrap_or("the verifier says nothing").to_owned(),
        })
    }

    fn load_once(&self, log: &mut [u8]) -> Result<OwnedFd, Errno> {
        const BPF_PROG_LOAD: c_int = 5;
        const BPF_PROG_TYPE_SCHED_CLS: u32 = 3;
        #[repr(C)]
        struct Attr {
            prog_type: u32,
            insn_cnt: u32,
            insns: u64,
            license: u64,
            log_level: u32,
            log_size: u32,
            log_buf: u64,
            kern_version: u32,
            prog_flags: u32,
            prog_name: [u8; 16],
        }
        let mut attr = Attr {
            prog_type: BPF_PROG_TYPE_SCHED_CLS,
            insn_cnt: self.code.len() as u32,
            insns: self.code.as_ptr() as u64,
            license: LICENCE.as_ptr() as u64,
            log_level: u32::from(!log.is_empty()),
            log_size: log.len() as u32,
            log_buf: if log.is_empty() {
                0
            } else {
                log.as_mut_ptr() as u64
            },
            kern_version: 0,
            prog_flags: 0,
            prog_name: object_name(self.name),
        };
        // SAFETY: the attribute has the layout of BPF_PROG_LOAD; its pointers refer to the code, the
        // licence and the log, which outlive the call and have the sizes given.
        unsafe { bpf_fd(BPF_PROG_LOAD, &mut attr) }
    }
}

/// Kinds of maps.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum MapKind {
    /// A hash table that refuses what is beyond its size.
    Hash = 1,
    /// An array, indexed by `u32`.
    Array = 2,
    /// A hash table that forgets what was used least recently.
    LruHash = 9,
}

/// A map shared between programs and this process.
#[derive(Debug)]
pub struct Map {
    fd: OwnedFd,
    key_size: usize,
    value_size: usize,
}

impl Map {
    /// Makes a map; it lives as long as this value or a loaded program refers to it.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn new(
        kind: MapKind,
        name: &'static str,
        key_size: usize,
        value_size: usize,
        max_entries: u32,
    ) -> Result<Self, BpfError> {
        const BPF_MAP_CREATE: c_int = 0;
        #[repr(C)]
        struct Attr {
            map_type: u32,
            key_size: u32,
            value_size: u32,
            max_entries: u32,
            map_flags: u32,
            inner_map_fd: u32,
            numa_node: u32,
            map_name: [u8; 16],
        }
        debug_assert!(name.len() <= MAX_NAME, "the kernel would cut it");
        let mut attr = Attr {
            map_type: kind as u32,
            key_size: key_size as u32,
            value_size: value_size as u32,
            max_entries,
            map_flags: 0,
            inner_map_fd: 0,
            numa_node: 0,
            map_name: object_name(name),
        };
        let fd = with_memlock_raised(|| {
            // SAFETY: the attribute has the layout of BPF_MAP_CREATE and holds no pointer.
            unsafe { bpf_fd(BPF_MAP_CREATE, &mut attr) }
        });
        match fd {
            Ok(fd) => Ok(Self {
                fd,
                key_size,
                value_size,
            }),
            Err(errno @ (Errno::PERM | Errno::NOSYS)) => Err(BpfError::from(errno)),
            Err(errno) => Err(BpfError::Map { name, errno }),
        }
    }

    /// The value of a key; `None` if it is not there.
    pub fn lookup(&self, key: &[u8]) -> Option<Vec<u8>> {
        const BPF_MAP_LOOKUP_ELEM: c_int = 1;
        let mut value = vec![0; self.value_size];
        self.element(BPF_MAP_LOOKUP_ELEM, key, &mut value).ok()?;
        Some(value)
    }

    /// Sets the value of a key.
    ///
    /// # Errors
    /// If the kernel refuses, as when a hash is full.
    pub fn update(&self, key: &[u8], value: &[u8]) -> Result<(), Errno> {
        const BPF_MAP_UPDATE_ELEM: c_int = 2;
        self.element(BPF_MAP_UPDATE_ELEM, key, &mut value.to_vec())
    }

    /// Removes a key.
    ///
    /// # Errors
    /// `ENOENT` if it is not there.
    pub fn delete(&self, key: &[u8]) -> Result<(), Errno> {
        const BPF_MAP_DELETE_ELEM: c_int = 3;
        self.element(BPF_MAP_DELETE_ELEM, key, &mut [])
    }

    fn element(&self, command: c_int, key: &[u8], value: &mut [u8]) -> Result<(), Errno> {
        #[repr(C)]
        struct Attr {
            map_fd: u32,
            pad: u32,
            key: u64,
            value: u64,
            flags: u64,
        }
        if key.len() != self.key_size || ![0, self.value_size].contains(&value.len()) {
            return Err(Errno::INVAL);
        }
        let mut attr = Attr {
            map_fd: self.fd.as_raw_fd() as u32,
            pad: 0,
            key: key.as_ptr() as u64,
            value: if value.is_empty() {
                0
            } else {
                value.as_mut_ptr() as u64
            },
            flags: 0,
        };
        // SAFETY: the attribute has the layout of BPF_MAP_*_ELEM; key and value have the sizes with
        // which the map was made (no value is a null pointer) and outlive the call.
        unsafe { bpf(command, &mut attr) }.map(drop)
    }
}

impl AsFd for Map {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Why a program or a map could not be made.
#[derive(Debug, thiserror::Error)]
pub enum BpfError {
    /// No privileges.
    #[error(
        "the kernel lets only privileged processes load BPF programs; run as root, or with CAP_BPF and CAP_NET_ADMIN"
    )]
    Denied,
    /// A kernel without it.
    #[error("this kernel has no bpf(2) system call; it needs CONFIG_BPF_SYSCALL")]
    Absent,
    /// The kernel's verifier refused.
    #[error(
        "the kernel refuses BPF program {name}: {errno}: {words}; kernels from 5.10 on should take it"
    )]
    Load {
        /// The program's name.
        name: &'static str,
        /// The kernel's error number.
        errno: Errno,
        /// The verifier's last line.
        words: String,
    },
    /// The map could not be made.
    #[error("the kernel refuses BPF map {name}: {errno}")]
    Map {
        /// The map's name.
        name: &'static str,
        /// The kernel's error number.
        errno: Errno,
    },
    /// A program too large for its jumps.
    #[error("BPF program {name} is too large; move fewer addresses or ports, or whole addresses")]
    Jump {
        /// The program's name.
        name: &'static str,
    },
}

impl From<Errno> for BpfError {
    fn from(errno: Errno) -> Self {
        if errno == Errno::NOSYS {
            Self::Absent
        } else {
            Self::Denied
        }
    }
}

/// Kernels before 5.11 charge maps and programs to `RLIMIT_MEMLOCK` and say `EPERM` at its limit.
fn with_memlock_raised<T>(mut make: impl FnMut() -> Result<T, Errno>) -> Result<T, Errno> {
    match make() {
        Err(Errno::PERM) => {
            let unlimited = Rlimit {
                current: None,
                maximum: None,
            };
            setrlimit(Resource::Memlock, unlimited)?;
            make()
        }
        other => other,
    }
}

fn object_name(name: &str) -> [u8; 16] {
    let mut out = [0; 16];
    let length = name.len().min(MAX_NAME);
    out[..length].copy_from_slice(&name.as_bytes()[..length]);
    out
}

/// As [`bpf`], for the commands that answer with a descriptor (which is close-on-exec).
///
/// # Safety
/// As [`bpf`].
unsafe fn bpf_fd<A>(command: c_int, attr: &mut A) -> Result<OwnedFd, Errno> {
    // SAFETY: as the caller promises.
    let fd = unsafe { bpf(command, attr) }?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Calls `bpf(2)`.
///
/// # Safety
/// `A` must have the layout of `union bpf_attr` for `command`, and its pointers must be valid.
unsafe fn bpf<A>(command: c_int, attr: &mut A) -> Result<c_int, Errno> {
    let attr: *mut A = attr;
    // SAFETY: as the caller promises; the kernel reads no more of the attribute than its size.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attr, size_of::<A>()) };
    if result < 0 {
        let error = io::Error::last_os_error();
        return Err(Errno::from_io_error(&error).unwrap_or(Errno::IO));
    }
    Ok(result as c_int)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// What became of a packet that was shown to a program.
    #[derive(Debug, PartialEq, Eq)]
    pub(in crate::kernel) struct Outcome {
        pub(in crate::kernel) verdict: i32,
        pub(in crate::kernel) mark: u32,
    }

    /// Shows a frame to a loaded program (`BPF_PROG_TEST_RUN`), as if received on `lo`.
    pub(in crate::kernel) fn run(program: BorrowedFd<'_>, frame: &[u8]) -> Outcome {
        #[repr(C)]
        struct Attr {
            prog_fd: u32,
            retval: u32,
            data_size_in: u32,
            data_size_out: u32,
            data_in: u64,
            data_out: u64,
            repeat: u32,
            duration: u32,
            ctx_size_in: u32,
            ctx_size_out: u32,
            ctx_in: u64,
            ctx_out: u64,
        }
        const BPF_PROG_TEST_RUN: c_int = 10;
        let mut context = [0_u32; 48];
        let mut attr = Attr {
            prog_fd: program.as_raw_fd() as u32,
            retval: 0,
            data_size_in: frame.len() as u32,
            data_size_out: 0,
            data_in: frame.as_ptr() as u64,
            data_out: 0,
            repeat: 1,
            duration: 0,
            ctx_size_in: 0,
            ctx_size_out: size_of_val(&context) as u32,
            ctx_in: 0,
            ctx_out: context.as_mut_ptr() as u64,
        };
        // SAFETY: the attribute has the layout of BPF_PROG_TEST_RUN; frame and context outlive the call.
        unsafe { bpf(BPF_PROG_TEST_RUN, &mut attr) }.expect("BPF_PROG_TEST_RUN");
        Outcome {
            verdict: attr.retval.cast_signed(),
            mark: context[2],
        }
    }

    #[test]
    fn instructions_are_encoded_as_the_standard_says() {
        let mut asm = Assembler::new();
        let end = asm.label();
        asm.mov(Reg::R6, Reg::R1);
        asm.load_packet(Size::H, 12);
        asm.jump_if(Reg::R0, If::Ne, 0x0800, end);
        asm.store(Size::W, Reg::R10, -4, 7);
        asm.call(Helper::Redirect);
        asm.bind(end);
        asm.mov(Reg::R0, -1);
        asm.exit();
        let program = asm.finish("t").unwrap();
        assert_eq!(
            program.code,
            [
                [0xbf, 0x16, 0, 0, 0, 0, 0, 0],
                [0x28, 0, 0, 0, 12, 0, 0, 0],
                [0x56, 0, 2, 0, 0, 8, 0, 0],
                [0x62, 0x0a, 0xfc, 0xff, 7, 0, 0, 0],
                [0x85, 0, 0, 0, 23, 0, 0, 0],
                [0xb7, 0, 0, 0, 0xff, 0xff, 0xff, 0xff],
                [0x95, 0, 0, 0, 0, 0, 0, 0],
            ]
        );
    }

    #[test]
    fn a_jump_too_far_or_to_nowhere_is_refused() {
        let mut asm = Assembler::new();
        let end = asm.label();
        asm.jump(end);
        assert!(matches!(asm.finish("t"), Err(BpfError::Jump { .. })));
        let mut asm = Assembler::new();
        let end = asm.label();
        asm.jump_if(Reg::R1, If::Eq, 0, end);
        for _ in 0..40_000 {
            asm.mov(Reg::R0, 0);
        }
        asm.bind(end);
        asm.exit();
        assert!(matches!(asm.finish("t"), Err(BpfError::Jump { .. })));
    }

    #[test]
    fn what_nothing_leads_to_is_left_out() {
        let mut asm = Assembler::new();
        let end = asm.label();
        asm.mov(Reg::R0, 0);
        asm.jump(end);
        asm.mov(Reg::R0, 1);
        asm.exit();
        asm.bind(end);
        asm.exit();
        let program = asm.finish("t").unwrap();
        assert_eq!(program.len(), 3);
        program.load().expect("run the tests as root");
    }

    #[test]
    fn the_verifiers_last_words_are_in_the_error() {
        let mut asm = Assembler::new();
        asm.load(Size::W, Reg::R0, Reg::R3, 0);
        asm.exit();
        let error = asm.finish("t").unwrap().load().unwrap_err().to_string();
        assert!(
            error.contains("R3 !read_ok"),
            "{error}; run the tests as root"
        );
    }

    #[test]
    fn a_map_keeps_what_it_is_told() {
        let map = Map::new(MapKind::Hash, "t", 4, 8, 1).expect("run the tests as root");
        assert_eq!(map.lookup(&[1; 4]), None);
        map.update(&[1; 4], &[2; 8]).unwrap();
        assert_eq!(map.lookup(&[1; 4]), Some(vec![2; 8]));
        assert_eq!(map.update(&[3; 4], &[2; 8]), Err(Errno::TOOBIG));
        map.delete(&[1; 4]).unwrap();
        assert_eq!(map.delete(&[1; 4]), Err(Errno::NOENT));
    }
}
