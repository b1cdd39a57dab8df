//! Whether a program reads only what it has written of its stack, as the strictest verifier sees
//! it.
//!
//! A verifier of today lets privileged programs read what nobody has written ("bpf: Allow reads
//! from uninit stack"), and follows constants through the stack. One of Linux 5.10.46, as Debian 11
//! came out with, does neither: a flag on the stack that rules a path out counts for nothing, and a
//! program that relies on it is refused there and nowhere else. Tests on this host's kernel cannot
//! see that, so every program that a test assembles is looked at here too.
//!
//! It goes along every path, and knows of each register whether it is a constant, a place on the
//! stack, or neither; of the stack, only which bytes are written.

use std::collections::HashMap;

use super::assembler::{Helper, Reg};

/// The bytes of a stack frame (`MAX_BPF_STACK`).
const FRAME: usize = 512;

/// What is known of a register.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Known {
    /// Nothing, or that it points elsewhere.
    Nothing,
    /// Its value.
    Value(u64),
    /// It points to the stack, so far below its end.
    Place(i64),
}

/// What is known before an instruction.
#[derive(Clone, PartialEq, Eq)]
struct State {
    regs: [Known; 11],
    written: [u64; FRAME / 64],
}

impl State {
    fn first() -> Self {
        let mut regs = [Known::Nothing; 11];
        regs[Reg::R10 as usize] = Known::Place(0);
        Self {
            regs,
            written: [0; FRAME / 64],
        }
    }

    /// Whether whoever is content with this state is content with the other one as well.
    fn covers(&self, other: &Self) -> bool {
        let regs = self.regs.iter().zip(&other.regs);
        let mut bytes = self.written.iter().zip(&other.written);
        regs.into_iter()
            .all(|(a, b)| *a == Known::Nothing || a == b)
            && bytes.all(|(a, b)| a & !b == 0)
    }

    fn bytes(place: i64, len: u64) -> impl Iterator<Item = usize> {
        (0..len as i64).filter_map(move |at| usize::try_from(FRAME as i64 + place + at).ok())
    }

    fn write(&mut self, place: i64, len: u64) {
        for byte in Self::bytes(place, len) {
            self.written[byte / 64] |= 1 << (byte % 64);
        }
    }

    fn has(&self, place: i64, len: u64) -> bool {
        Self::bytes(place, len).all(|byte| self.written[byte / 64] & 1 << (byte % 64) != 0)
    }

    fn value(&self, reg: Reg) -> Option<u64> {
        match self.regs[reg as usize] {
            Known::Value(value) => Some(value),
            Known::Nothing | Known::Place(_) => None,
        }
    }

    /// The place and the length of what an argument and the one after it name.
    fn buffer(&self, at: Reg, len: Reg) -> Option<(i64, u64)> {
        match self.regs[at as usize] {
            Known::Place(place) => Some((place, self.value(len)?)),
            Known::Nothing | Known::Value(_) => None,
        }
    }

    /// What a helper reads of the stack, and what it writes there.
    #[allow(
        clippy::type_complexity,
        reason = "it is one place and one length, twice"
    )]
    fn arguments(&self, helper: i32) -> [Option<(i64, u64)>; 2] {
        use Reg::{R1, R2, R3, R4};
        let is = |of: Helper| helper == of as i32;
        if is(Helper::SkbLoadBytes) || is(Helper::SkbLoadBytesRelative) {
            [None, self.buffer(R3, R4)]
        } else if is(Helper::SkbStoreBytes) {
            [self.buffer(R3, R4), None]
        } else if is(Helper::CsumDiff) {
            [self.buffer(R1, R2), None]
        } else if is(Helper::FibLookup)
            || is(Helper::RedirectNeigh)
            || is(Helper::SkLookupTcp)
            || is(Helper::SkLookupUdp)
            || is(Helper::SkcLookupTcp)
        {
            [self.buffer(R2, R3), None]
        } else {
            [None, None]
        }
    }
}

/// The first instruction that reads of the stack what is not written on some path to it, and what
/// it reads.
pub(super) fn unwritten_read(code: &[[u8; 8]]) -> Option<(usize, i64)> {
    let mut seen = HashMap::<usize, Vec<State>>::new();
    let mut paths = vec![(0_usize, State::first())];
    while let Some((at, mut state)) = paths.pop() {
        let Some(bytes) = code.get(at) else { continue };
        let known = seen.entry(at).or_default();
        if known.iter().any(|before| before.covers(&state)) {
            continue;
        }
        known.push(state.clone());
        match step(bytes, at, &mut state) {
            Step::Unwritten(place) => return Some((at, place)),
            Step::End => {}
            Step::On(next) => paths.extend(next.into_iter().map(|next| (next, state.clone()))),
        }
    }
    None
}

/// Where an instruction leads.
enum Step {
    /// To these.
    On(Vec<usize>),
    /// Nowhere.
    End,
    /// It reads this place of the stack, which is not written.
    Unwritten(i64),
}

/// What an instruction does.
fn step(bytes: &[u8; 8], at: usize, state: &mut State) -> Step {
    const SIZES: [u64; 4] = [4, 2, 1, 8];
    let [opcode, regs, o0, o1, i0, i1, i2, i3] = *bytes;
    let (dst, src) = match cfg!(target_endian = "little") {
        true => (usize::from(regs & 0xf), usize::from(regs >> 4)),
        false => (usize::from(regs >> 4), usize::from(regs & 0xf)),
    };
    let offset = i16::from_ne_bytes([o0, o1]);
    let imm = i32::from_ne_bytes([i0, i1, i2, i3]);
    let size = SIZES[usize::from(opcode >> 3 & 3)];
    let place = |reg: usize, state: &State| match state.regs[reg] {
        Known::Place(place) => Some(place + i64::from(offset)),
        Known::Nothing | Known::Value(_) => None,
    };
    let next = Step::On(vec![at + 1]);
    match opcode & 7 {
        // Of the packet, into R0, or 64 bits that take two instructions.
        0 if opcode & 0xe0 == 0 => {
            state.regs[dst] = Known::Nothing;
            return Step::On(vec![at + 2]);
        }
        0 => state.regs[..=5].fill(Known::Nothing),
        1 => {
            if let Some(place) = place(src, state)
                && !state.has(place, size)
            {
                return Step::Unwritten(place);
            }
            state.regs[dst] = Known::Nothing;
        }
        2 | 3 => {
            if let Some(place) = place(dst, state) {
                state.write(place, size);
            }
        }
        4 => state.regs[dst] = Known::Nothing,
        5 | 6 if opcode >> 4 == 8 => {
            let [reads, writes] = state.arguments(imm);
            if let Some((place, len)) = reads
                && !state.has(place, len)
            {
                return Step::Unwritten(place);
            }
            if let Some((place, len)) = writes {
                state.write(place, len);
            }
            state.regs[..=5].fill(Known::Nothing);
        }
        5 | 6 if opcode >> 4 == 9 => return Step::End,
        5 | 6 => {
            let to = (at as i64 + 1 + i64::from(offset)) as usize;
            return jump(opcode, (state, dst, src), imm, (to, at + 1));
        }
        _ => {
            let operand = match opcode & 8 {
                0 => Known::Value(i64::from(imm) as u64),
                _ => state.regs[src],
            };
            state.regs[dst] = match (opcode & 0xf0, state.regs[dst], operand) {
                (0xb0, _, operand) => operand,
                (0x00, Known::Place(place), Known::Value(by)) => Known::Place(place + by as i64),
                (0x10, Known::Place(place), Known::Value(by)) => Known::Place(place - by as i64),
                (0x00, Known::Value(a), Known::Value(b)) => Known::Value(a.wrapping_add(b)),
                _ => Known::Nothing,
            };
        }
    }
    next
}

/// The ways that a jump may go: one of them where both operands are known.
fn jump(
    opcode: u8,
    (state, dst, src): (&mut State, usize, usize),
    imm: i32,
    (to, next): (usize, usize),
) -> Step {
    if opcode & 0xf0 == 0 {
        return Step::On(vec![to]);
    }
    let operand = match opcode & 8 {
        0 => Known::Value(i64::from(imm) as u64),
        _ => state.regs[src],
    };
    let (Known::Value(a), Known::Value(b)) = (state.regs[dst], operand) else {
        return Step::On(vec![next, to]);
    };
    let (a, b) = match opcode & 7 {
        6 => (a & 0xffff_ffff, b & 0xffff_ffff),
        _ => (a, b),
    };
    let holds = match opcode & 0xf0 {
        0x10 => a == b,
        0x20 => a > b,
        0x30 => a >= b,
        0x40 => a & b != 0,
        0x50 => a != b,
        0xa0 => a < b,
        0xb0 => a <= b,
        // Signed ones are not followed.
        _ => return Step::On(vec![next, to]),
    };
    Step::On(vec![if holds { to } else { next }])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::bpf::{Alu, Assembler, If, Program, Size};

    /// Reads the second word only if the first one, on the stack, says that it is written.
    fn by_flag(asm: &mut Assembler) {
        let (no, end) = (asm.label(), asm.label());
        asm.store(Size::W, Reg::R10, -4, 0);
        asm.jump_if(Reg::R1, If::Eq, 0, no);
        asm.store(Size::W, Reg::R10, -4, 1);
        asm.store(Size::W, Reg::R10, -8, 1);
        asm.bind(no);
        asm.load(Size::W, Reg::R0, Reg::R10, -4);
        asm.jump_if(Reg::R0, If::Eq, 0, end);
        asm.load(Size::W, Reg::R0, Reg::R10, -8);
        asm.bind(end);
        asm.mov(Reg::R0, 0);
        asm.exit();
    }

    /// As [`by_flag`], but the flag is in a register, which every verifier follows.
    fn by_register(asm: &mut Assembler) {
        let (no, end) = (asm.label(), asm.label());
        asm.mov(Reg::R6, 0);
        asm.jump_if(Reg::R1, If::Eq, 0, no);
        asm.mov(Reg::R6, 1);
        asm.store(Size::W, Reg::R10, -8, 1);
        asm.bind(no);
        asm.jump_if(Reg::R6, If::Eq, 0, end);
        asm.load(Size::W, Reg::R0, Reg::R10, -8);
        asm.bind(end);
        asm.mov(Reg::R0, 0);
        asm.exit();
    }

    /// A helper reads what only another helper may have written.
    fn by_helper(asm: &mut Assembler, written: bool) {
        let argument = |asm: &mut Assembler| {
            asm.mov(Reg::R1, Reg::R6);
            asm.mov(Reg::R2, 0);
            asm.mov(Reg::R3, Reg::R10);
            asm.alu(Alu::Add, Reg::R3, -16);
            asm.mov(Reg::R4, 8);
        };
        asm.mov(Reg::R6, Reg::R1);
        if written {
            argument(asm);
            asm.call(Helper::SkbLoadBytes);
        }
        argument(asm);
        asm.mov(Reg::R5, 0);
        asm.call(Helper::SkbStoreBytes);
        asm.exit();
    }

    fn of(write: impl FnOnce(&mut Assembler)) -> Program {
        let mut asm = Assembler::new();
        write(&mut asm);
        asm.finish_unseen("t").unwrap()
    }

    #[test]
    fn what_nobody_has_written_on_some_path_is_found() {
        assert_eq!(unwritten_read(of(by_flag).code()), Some((6, -8)));
        assert_eq!(unwritten_read(of(by_register).code()), None);
        assert_eq!(unwritten_read(of(|asm| by_helper(asm, true)).code()), None);
        let read = unwritten_read(of(|asm| by_helper(asm, false)).code());
        assert_eq!(read, Some((7, -16)));
    }
}
