//! Instructions, labels and how they become a program.
//!
//! Instruction set: `Documentation/bpf/standardization/instruction-set.rst`.

use std::os::fd::{AsRawFd, BorrowedFd};

use super::load::Program;
use super::{BpfError, MAX_NAME};

/// A register. R0 holds results. R1–R5 hold arguments, and calls and packet loads destroy them.
/// R6–R9 keep their values. R10 points to the end of the stack frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[allow(clippy::missing_docs_in_private_items, reason = "they are their names")]
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
#[allow(clippy::missing_docs_in_private_items, reason = "they are their names")]
pub enum Alu {
    Add,
    Sub,
    Mul,
    Or,
    And,
    Lsh,
    Rsh,
    Xor,
    Mov,
}

impl Alu {
    fn bits(self) -> u8 {
        match self {
            Self::Add => 0x00,
            Self::Sub => 0x10,
            Self::Mul => 0x20,
            Self::Or => 0x40,
            Self::And => 0x50,
            Self::Lsh => 0x60,
            Self::Rsh => 0x70,
            Self::Xor => 0xa0,
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

/// Functions of the kernel that programs may call. Kernel 5.10 has them all; `FibLookup`
/// wants a licence compatible with the GPL.
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
    /// `(skb, programs, index)`: goes on with that program and does not return, unless there is
    /// none.
    TailCall = 12,
    /// `(skb, offset, from, to, size) → 0 or an error`.
    L3CsumReplace = 10,
    /// `(skb, offset, from, to, flags) → 0 or an error`.
    L4CsumReplace = 11,
    /// `(skb) → 0 or an error`.
    SkbVlanPop = 19,
    /// `(ifindex, flags) → verdict`.
    Redirect = 23,
    /// `(skb, offset, to, length) → 0 or an error`.
    SkbLoadBytes = 26,
    /// `(from, length, to, length, seed) → the difference of their sums`.
    CsumDiff = 28,
    /// `(skb, packet type) → 0 or an error`.
    SkbChangeType = 32,
    /// `(skb, length) → 0 or an error`: that many bytes lie in one piece from now on.
    SkbPullData = 39,
    /// `(skb, bytes, flags) → 0 or an error`.
    SkbChangeHead = 43,
    /// `(skb) → the number of the user whose socket sends it`.
    GetSocketUid = 47,
    /// `(skb, offset, to, length, from the link-layer or the network header) → 0 or an error`.
    SkbLoadBytesRelative = 68,
    /// `(skb, params, params length, flags) → 0 or the reason`.
    FibLookup = 69,
    /// `(skb, depth) → the control group so deep below the root that its socket is in, or 0`.
    SkbAncestorCgroupId = 83,
    /// `(skb, tuple, tuple length, namespace, flags) → a full socket, to be released, or 0`.
    SkLookupTcp = 84,
    /// As `SkLookupTcp`.
    SkLookupUdp = 85,
    /// `(socket) → 0`.
    SkRelease = 86,
    /// `(socket) → the same, if it is a full one, or 0`.
    SkFullsock = 95,
    /// `(socket) → struct bpf_tcp_sock, or 0`.
    TcpSock = 96,
    /// As `SkLookupTcp`, but what stands for a connection that is opening or was closed as well.
    SkcLookupTcp = 99,
    /// `(map, socket, value, flags) → value or 0`.
    SkStorageGet = 107,
    /// `(ring, bytes, flags) → a record, to be submitted or discarded, or 0`.
    RingReserve = 131,
    /// `(record, flags)`.
    RingSubmit = 132,
    /// `(record, flags)`.
    RingDiscard = 133,
    /// `() → ticks since boot`, 100 to 1000 a second. It is a load, not a call.
    Jiffies64 = 118,
    /// `(ifindex, params, params length, flags) → verdict`.
    RedirectNeigh = 152,
}

/// A place in the code to jump to. It is bound once, before or after the jumps to it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[must_use]
pub struct Label(usize);

/// From where the places in a packet count that a program reads.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
enum Origin {
    /// From the first byte that the kernel shows: of the link-layer header, if there is one.
    #[default]
    Frame,
    /// From the IP header, whatever the kernel shows before it.
    Network,
}

/// Writes a program, instruction by instruction.
#[derive(Default)]
pub struct Assembler {
    code: Vec<Instruction>,
    labels: Vec<Option<usize>>,
    jumps: Vec<(usize, Label)>,
    origin: Origin,
}

impl Assembler {
    const LD: u8 = 0x00;
    const LDX: u8 = 0x01;
    const ST: u8 = 0x02;
    const STX: u8 = 0x03;
    const ALU: u8 = 0x04;
    const JMP: u8 = 0x05;
    const JMP32: u8 = 0x06;
    const ALU64: u8 = 0x07;
    const FROM_REG: u8 = 0x08;
    const MODE_ABS: u8 = 0x20;
    const MODE_IND: u8 = 0x40;
    const MODE_MEM: u8 = 0x60;
    const MODE_ATOMIC: u8 = 0xc0;

    /// An empty program.
    pub fn new() -> Self {
        Self::default()
    }

    /// An empty program for packets that arrive at an interface with a link-layer header of this
    /// length. If there is none, the places that it loads count from the IP header: what the kernel
    /// shows before it there depends on kind and kernel. A packet out of a GRE tunnel has the
    /// tunnel's own headers before it, and with Linux 5.10 so has one out of IPIP or SIT.
    ///
    /// Such a program must begin with [`Self::pull_headers`].
    pub fn arriving(l2_header: u32) -> Self {
        Self {
            origin: match l2_header {
                0 => Origin::Network,
                _ => Origin::Frame,
            },
            ..Self::default()
        }
    }

    /// Has the headers in one piece, where loads that count from the IP header find them; nothing
    /// for other programs. The context must be in R1, and is destroyed there.
    pub fn pull_headers(&mut self) {
        // `__sk_buff.len`.
        const LEN: i16 = 0;
        // As much as drivers copy in front at least, so that mostly nothing is to be done.
        const HEADERS: u32 = 256;
        if self.origin == Origin::Frame {
            return;
        }
        let all = self.label();
        self.load(Size::W, Reg::R2, Reg::R1, LEN);
        self.jump_if(Reg::R2, If::Le, HEADERS, all);
        self.mov(Reg::R2, HEADERS);
        self.bind(all);
        self.call(Helper::SkbPullData);
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

    /// `dst =` its lower 32 bits, from network order into this host's or back.
    pub fn swap_if_little_endian(&mut self, dst: Reg) {
        const END: u8 = 0xd0;
        self.push(Self::ALU | END | Self::FROM_REG, dst as u8, 0, 0, 32);
    }

    /// `dst = map`; the program keeps the map when `map` is closed.
    pub fn load_map(&mut self, dst: Reg, map: BorrowedFd<'_>) {
        const PSEUDO_MAP_FD: u8 = 1;
        self.load_wide(dst, PSEUDO_MAP_FD, map.as_raw_fd() as u64);
    }

    /// `dst =` the address of the byte at `offset` in the one value of an array; the program keeps
    /// the map when `map` is closed.
    pub fn load_address(&mut self, dst: Reg, map: BorrowedFd<'_>, offset: u32) {
        const PSEUDO_MAP_VALUE: u8 = 2;
        let place = map.as_raw_fd() as u64 | u64::from(offset) << 32;
        self.load_wide(dst, PSEUDO_MAP_VALUE, place);
    }

    /// `R0 =` the packet's bytes at `offset`, in host order. R6 must hold the context. A load past
    /// the packet's end ends the program with verdict 0: the packet passes.
    pub fn load_packet(&mut self, size: Size, offset: u32) {
        let opcode = Self::LD | Self::MODE_ABS | size.bits();
        self.push(opcode, 0, 0, 0, self.place(offset));
    }

    /// As [`Self::load_packet`], at `base + offset`.
    pub fn load_packet_at(&mut self, size: Size, base: Reg, offset: u32) {
        let opcode = Self::LD | Self::MODE_IND | size.bits();
        self.push(opcode, 0, base as u8, 0, self.place(offset));
    }

    /// Copies R4 bytes of the packet, from the place in R2 on, to where R3 points: R0 = 0 or an
    /// error. The context must be in R1.
    pub fn load_packet_bytes(&mut self) {
        // linux/bpf.h: BPF_HDR_START_NET
        const FROM_NETWORK_HEADER: i32 = 1;
        match self.origin {
            Origin::Frame => self.call(Helper::SkbLoadBytes),
            Origin::Network => {
                self.mov(Reg::R5, FROM_NETWORK_HEADER);
                self.call(Helper::SkbLoadBytesRelative);
            }
        }
    }

    /// The constant of a packet load at this place.
    fn place(&self, offset: u32) -> i32 {
        // linux/filter.h: SKF_NET_OFF
        const NETWORK_HEADER: i32 = -0x10_0000;
        match self.origin {
            Origin::Frame => offset.cast_signed(),
            Origin::Network => NETWORK_HEADER + offset.cast_signed(),
        }
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

    /// `*(base + offset) += src`, in one step, 32 bits.
    pub fn add_word_atomically(&mut self, base: Reg, offset: i16, src: Reg) {
        let opcode = Self::STX | Self::MODE_ATOMIC | Size::W.bits();
        self.push(opcode, base as u8, src as u8, offset, 0);
    }

    /// `*(base + offset) += src`, in one step, all 64 bits.
    pub fn add_atomically(&mut self, base: Reg, offset: i16, src: Reg) {
        let opcode = Self::STX | Self::MODE_ATOMIC | Size::Dw.bits();
        self.push(opcode, base as u8, src as u8, offset, 0);
    }

    /// Jumps.
    pub fn jump(&mut self, to: Label) {
        self.jumps.push((self.code.len(), to));
        self.push(Self::JMP, 0, 0, 0, 0);
    }

    /// Jumps if the comparison holds for the lower 32 bits.
    pub fn jump_if(&mut self, dst: Reg, cond: If, operand: impl Into<Operand>, to: Label) {
        self.jumps.push((self.code.len(), to));
        self.with_operand(Self::JMP32 | cond.bits(), dst, operand.into());
    }

    /// Jumps if the comparison holds for all 64 bits.
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

    /// Resolves the jumps. It leaves out instructions that no path reaches, which the verifier
    /// would refuse, so a generator need not check whether anything leads to the parts it writes.
    ///
    /// # Errors
    /// If a jump is too far for its 16 bits, or goes to a label that was never bound.
    pub fn finish(self, name: &'static str) -> Result<Program, BpfError> {
        let program = self.finish_unseen(name)?;
        #[cfg(test)]
        assert_eq!(
            super::stack::unwritten_read(program.code()),
            None,
            "{name}: instruction, place on the stack"
        );
        Ok(program)
    }

    /// As [`Self::finish`], without a look at the stack in tests.
    pub(super) fn finish_unseen(self, name: &'static str) -> Result<Program, BpfError> {
        debug_assert!(name.len() <= MAX_NAME, "the kernel would truncate it");
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
        Ok(Program::new(name, code))
    }

    /// Tells which instructions some path from the first one leads to.
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

#[derive(Clone, Copy)]
struct Instruction {
    opcode: u8,
    dst: u8,
    src: u8,
    offset: i16,
    imm: i32,
}

impl Instruction {
    /// The bytes of a `struct bpf_insn`. The order of its two register nibbles follows the byte
    /// order.
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

#[cfg(test)]
mod tests {
    use super::*;

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
            program.code(),
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
    fn places_count_from_the_ip_header_where_there_is_no_other() {
        let code = |mut asm: Assembler| {
            asm.load_packet(Size::B, 9);
            asm.load_packet_at(Size::H, Reg::R7, 2);
            asm.load_packet_bytes();
            asm.exit();
            asm.finish("t").unwrap().code().to_vec()
        };
        let exit = [0x95, 0, 0, 0, 0, 0, 0, 0];
        assert_eq!(
            code(Assembler::arriving(14)),
            [
                [0x30, 0, 0, 0, 9, 0, 0, 0],
                [0x48, 0x70, 0, 0, 2, 0, 0, 0],
                [0x85, 0, 0, 0, 26, 0, 0, 0],
                exit,
            ]
        );
        assert_eq!(
            code(Assembler::arriving(0)),
            [
                [0x30, 0, 0, 0, 9, 0, 0xf0, 0xff],
                [0x48, 0x70, 0, 0, 2, 0, 0xf0, 0xff],
                [0xb7, 5, 0, 0, 1, 0, 0, 0],
                [0x85, 0, 0, 0, 68, 0, 0, 0],
                exit,
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
    fn unreachable_instructions_are_left_out() {
        let mut asm = Assembler::new();
        let end = asm.label();
        asm.mov(Reg::R0, 0);
        asm.jump(end);
        asm.mov(Reg::R0, 1);
        asm.exit();
        asm.bind(end);
        asm.exit();
        let program = asm.finish("t").unwrap();
        assert_eq!(program.code().len(), 3);
        program.load().expect("run the tests as root");
    }
}
