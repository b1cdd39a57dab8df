//! Whose a packet is that comes for what has moved: whether it belongs to a conversation that this
//! host has itself, or a host behind it. For [`capture`](super::capture()), just before it takes a
//! packet; and for the [return path](super::return_path()), which notes what the new server has.
//!
//! * TCP of this host is whatever a socket there has a connection for, or is about to. A new
//!   connection takes over only what was closed (RFC 9293 section 3.6.1): anything else answers its
//!   SYN with a challenge (RFC 5961 section 4), so a forged one does no harm, and a client that
//!   began anew sends it again.
//! * UDP is where a socket is connected to the sender, however that came about, and where it may
//!   come [from another port](super::another_port) than this host spoke to.
//! * Anything else is what this host, or one behind it, [has begun](super::note_own()), as long as
//!   it speaks, and, if a socket spoke, as long as there is one.
//! * An ICMP error goes where the packet went that it quotes, a later fragment where the first one
//!   went.
//! * About what belongs to no conversation that is known the [mode](super::modes) decides.
//! * What a DHCP server sends is for whoever holds the address, so it stays in any case (RFC 2131
//!   section 4.1, RFC 8415 section 7.2).
//!
//! ```text
//! parse();                                           // other: take; later, none: below
//! if (UDP, to the port of a DHCP client) stay;
//! if ((!ICMP || modes.some) && (t = lookup(taken, key))) {            // most packets
//!     if (UDP && !t->answered && it may come from any port) stay;     // see `another_port`
//!     take;
//! }
//! if ((o = lookup(kept, key) ?: lookup(own, key)) && !(o->stage == REQUEST && !TCP)) {
//!     if (TCP) {
//!         if (SYN ? !CLOSED && (now - o->seen <= OWN_IDLE || asked(o))
//!                 : CLOSED || now - o->seen <= OWN_IDLE_TCP) {
//!             if (OPENING && it acknowledges o->stage) {
//!                 if (!SYN) came[key] = 0;                         // a client, see `served_here`
//!                 move(own, kept, key, { now, KIND_BEHIND });
//!             }
//!             if (RST && BEHIND) move(kept, own, key, { now, KIND_BEHIND, STAGE_RESET });
//!             stay;
//!         }
//!     } else if (now - o->seen <= (YOUNG ? YOUNG_IDLE : LASTING ? OWN_LASTING : OWN_IDLE)
//!                && (o->kind != KIND_SOCKET or _LASTING || sk_lookup_udp())) {
//!         if (PLAIN && !quoted) o->stage = STAGE_HEARD;
//!         stay;
//!     }
//!     delete(kept and own, key);
//! }
//! // asked(o): the first SYN marks it as KIND_ASKED; it is over if that stands one second later.
//! if (TCP && (s = skc_lookup_tcp()) && s->state != LISTEN) {
//!     if (!(SYN && s->state == TIME_WAIT)) stay;
//!     anew = true;                                   // or the rest would go to what was closed
//! }
//! if (UDP && (s = sk_lookup_udp()) && s->state == ESTABLISHED) stay;
//! if (UDP && it may come from any port) stay;                         // see `another_port`
//! if (FRAGMENT == FIRST_FRAGMENT && (t = lookup(others, key)) && now - *t <= OWN_IDLE) stay;
//! decide: if (modes.some) switch (modes) { ask: take; here: goto here; moved: }   // see `modes`
//! if (it tells nothing) take;
//! if (anew || !ICMP && !SYN && !quoted) update(taken, key, 0);     // another SYN leaves no memory
//! take:   if (FRAGMENT == FIRST_FRAGMENT) {
//!             if (modes.some) update(fragments, key by identification, 1);
//!             else delete(fragments, key by identification);
//!         }
//!         go on
//! here:   if (it begins something without TCP) update(own, key, { now, KIND_BEHIND, REQUEST });
//! stay:   if (FRAGMENT == FIRST_FRAGMENT) update(fragments, key by identification, 0);
//!         count; if (modes.some) go on with `served_here`; return TC_ACT_UNSPEC;
//! none:   if (an ICMP query) go on above, with the key of a client's query
//!         if (!modes.some) take;
//!         goto decide;
//! later:  if (!(t = lookup(fragments, key by identification))) goto decide;
//!         if (FRAGMENT == LAST_FRAGMENT) delete(fragments, key by identification);
//!         if (*t) take; count; return TC_ACT_UNSPEC;
//! ```

use Reg::{R0, R1, R7, R8, R10};

use super::another_port;
use super::facts::Facts;
use super::flows::{KEY_LAST, KEY_LOCAL, VALUE, enter, enter_now, jump_if_within, look_up, remove};
use super::headers::{ipv4, ipv6, sock, tcp};
use super::modes::{BEGINS, Modes, TELLS, TELLS_NOTHING};
use super::own::{
    ASKED_TICK, ASKED_TICKS, KIND_ASKED, KIND_BEHIND, KIND_CLOSED, KIND_LASTING, KIND_OPENING,
    KIND_SOCKET, MAX_NOTED, OWN_IDLE, OWN_IDLE_TCP, OWN_KIND, OWN_LASTING, OWN_SEEN, OWN_STAGE,
    Own, STAGE_HEARD, STAGE_PLAIN, STAGE_REQUEST, STAGE_RESET, STAGE_YOUNG, YOUNG_IDLE,
};
use super::parse::{
    FIRST_FRAGMENT, FLAGS, FRAGMENT, HEADER, LAST_FRAGMENT, QUOTED, Side, Ways,
    key_by_identification, key_of_other_query, load_syn, mark_as_of_client, parse,
    remember_first_fragment, wire,
};
use super::phrases::{PROTOCOL, TC_ACT_UNSPEC, jump_if_icmp, jump_if_v6, look_up_at, verdict};
use super::served_here::{End, ServedHere};
use super::sockets::{look_up_socket, release_keeping_state};
use crate::kernel::bpf::{Alu, Assembler, Helper, If, Label, Map, Reg, Size};
use crate::model::moved::{TCP, UDP};
use crate::packet::{ACK, RST, SYN};

/// An entry of a map, or a socket that is held, once the packet is read.
const FOUND: Reg = R7;

/// Where the stack keeps whether a new connection takes the place of what was closed here.
const ANEW: i16 = -220;

/// Where it keeps whether the packet was known to be taken.
const TAKEN: i16 = -236;

/// Most bytes beyond the expected number that who has seen it acknowledges: what a server sends at
/// once. A stranger guesses one of 2¹⁶ numbers.
const ACKNOWLEDGED: i32 = 0xffff;

/// The ports of DHCP clients (RFC 2131 section 4.1, RFC 8415 section 7.2).
pub const DHCP_CLIENTS: [u16; 2] = [68, 546];

/// Goes on if the packet is none of this host's own. Ends the program otherwise: it passes. Nothing
/// but the packet is left in any register.
pub(super) fn leave_own(a: &mut Assembler, l2: u32, facts: &Facts) {
    let (own, modes) = (&facts.own, &facts.modes);
    let ways = Ways::new(a);
    let (take, stay, ask, unknown) = (a.label(), a.label(), a.label(), a.label());
    let (icmp, look, decide) = (a.label(), a.label(), a.label());
    parse(a, l2, Side::Remote, ways);

    a.bind(ways.quoted);
    a.mov(FRAGMENT, QUOTED);
    a.bind(ways.flow);
    let (without_ports, begun) = (a.label(), a.label());
    a.jump_if(PROTOCOL, If::Ne, i32::from(UDP), without_ports);
    a.load(Size::H, R0, R10, KEY_LAST + 2);
    for client in DHCP_CLIENTS {
        a.jump_if(R0, If::Eq, wire(i32::from(client)), stay);
    }
    a.bind(without_ports);
    jump_if_icmp(a, icmp);
    a.bind(look);
    look_up(a, &own.taken);
    a.jump_if_wide(R0, If::Eq, 0, ask);
    let from_any_port = a.label();
    a.jump_if(PROTOCOL, If::Ne, i32::from(UDP), take);
    another_port::jump_unless_any(a, own, take);
    a.load(Size::Dw, R0, R0, 0);
    a.jump_if_wide(R0, If::Ne, 0, take);
    a.store(Size::W, R10, TAKEN, 1);
    // Older verifiers do not follow that a flow with TAKEN does not come to where this is read.
    a.store(Size::W, R10, ANEW, 0);
    a.jump(from_any_port);
    a.bind(ask);
    own.look_up(a, begun);

    a.bind(unknown);
    let (entered, note, anew) = (a.label(), a.label(), a.label());
    let (plain, moved, here) = (a.label(), a.label(), a.label());
    a.store(Size::W, R10, ANEW, 0);
    ask_sockets(a, stay, anew);
    a.store(Size::W, R10, TAKEN, 0);
    a.bind(from_any_port);
    another_port::stay_if_noted(a, own, stay);
    a.load(Size::W, R0, R10, TAKEN);
    a.jump_if(R0, If::Ne, 0, take);
    stay_if_of_another_port(a, own, stay);
    let asked = a.label();
    a.jump(asked);
    a.bind(anew);
    a.store(Size::W, R10, ANEW, 1);
    a.bind(asked);
    modes.jump_if_plain(a, plain);
    Modes::tell(a);
    a.bind(decide);
    modes.decide(a, take, moved, here);

    a.bind(moved);
    a.load(Size::W, R0, R10, TELLS);
    a.jump_if(R0, If::Eq, TELLS_NOTHING, take);
    a.bind(plain);
    a.load(Size::W, R0, R10, ANEW);
    a.jump_if(R0, If::Ne, 0, note);
    jump_if_icmp(a, take);
    a.jump_if(FRAGMENT, If::Eq, QUOTED, take);
    load_syn(a);
    a.jump_if(R0, If::Eq, i32::from(SYN), take);
    a.bind(note);
    a.store(Size::Dw, R10, VALUE, 0);
    enter(a, &own.taken);
    a.jump(take);

    a.bind(here);
    a.load(Size::W, R0, R10, TELLS);
    a.jump_if(R0, If::Ne, BEGINS, stay);
    a.jump_if(PROTOCOL, If::Eq, i32::from(TCP), stay);
    note_request(a, own);
    a.jump(stay);

    // What the new server has of ICMP is noted only while that matters.
    a.bind(icmp);
    modes.jump_if_plain(a, ask);
    a.jump(look);
    a.bind(ways.none);
    key_of_other_query(a, Side::Remote, icmp);
    modes.jump_if_plain(a, take);
    let tells_nothing = a.label();
    a.jump(tells_nothing);

    a.bind(begun);
    judge_begun(a, own, Some(&facts.served), stay, unknown);
    a.jump(unknown);

    a.bind(ways.later);
    let (more, first_unknown) = (a.label(), a.label());
    follow_first(a, &own.fragments, first_unknown, entered);
    a.jump(more);
    a.bind(first_unknown);
    modes.jump_if_plain(a, entered);
    a.bind(tells_nothing);
    a.store(Size::W, R10, ANEW, 0);
    a.store(Size::W, R10, TELLS, TELLS_NOTHING);
    a.jump(decide);

    a.bind(stay);
    remember_first_fragment(a, &own.fragments, more);
    a.bind(more);
    own.count_stayed(a);
    let told = a.label();
    modes.jump_if_plain(a, told);
    facts.served.go_on(a, l2, End::Ingress);
    a.bind(told);
    verdict(a, TC_ACT_UNSPEC);

    for label in [take, ways.other] {
        a.bind(label);
    }
    let forget = a.label();
    a.jump_if(FRAGMENT, If::Ne, FIRST_FRAGMENT, entered);
    key_by_identification(a);
    modes.jump_if_plain(a, forget);
    a.store(Size::Dw, R10, VALUE, 1);
    enter(a, &own.fragments);
    a.jump(entered);
    a.bind(forget);
    remove(a, &own.fragments);
    a.bind(entered);
}

/// Goes on if the first fragment of a later one stayed, and jumps to `taken` if it was taken;
/// jumps to `unknown` if it is not known. The last one ends what was remembered.
fn follow_first(a: &mut Assembler, fragments: &Map, unknown: Label, taken: Label) {
    let more = a.label();
    key_by_identification(a);
    look_up(a, fragments);
    a.jump_if_wide(R0, If::Eq, 0, unknown);
    a.load(Size::Dw, FOUND, R0, 0);
    a.jump_if(FRAGMENT, If::Ne, LAST_FRAGMENT, more);
    remove(a, fragments);
    a.bind(more);
    a.jump_if_wide(FOUND, If::Ne, 0, taken);
}

/// Notes that a client asks this host, so that what answers has not begun by itself.
fn note_request(a: &mut Assembler, own: &Own) {
    Own::make_value(a, KIND_BEHIND, STAGE_REQUEST);
    own.enter_value(a);
}

/// Jumps to `stay` if the packet is the first fragment of UDP to a port that has not moved, from
/// whom this host has spoken to there.
fn stay_if_of_another_port(a: &mut Assembler, own: &Own, stay: Label) {
    let no = a.label();
    a.jump_if(FRAGMENT, If::Ne, FIRST_FRAGMENT, no);
    look_up(a, &own.others);
    a.jump_if_wide(R0, If::Eq, 0, no);
    a.mov(FOUND, R0);
    jump_if_within(a, (FOUND, 0), OWN_IDLE, stay);
    a.bind(no);
}

/// Jumps to `stay` if a conversation that this host has begun or answered, with its value at R0,
/// still is one, and to `unanswered` if it is not one yet; forgets it otherwise.
/// A client whose connection to a host behind this one is established is entered as `served`.
pub(super) fn judge_begun(
    a: &mut Assembler,
    own: &Own,
    served: Option<&ServedHere>,
    stay: Label,
    unanswered: Label,
) {
    let (tcp, begins, forget) = (a.label(), a.label(), a.label());
    let (goes_on, tcp_goes_on, full) = (a.label(), a.label(), a.label());
    let (young, lasting) = (a.label(), a.label());
    let (in_time, ask, gone) = (a.label(), a.label(), a.label());
    a.mov(FOUND, R0);
    a.jump_if(PROTOCOL, If::Eq, i32::from(TCP), tcp);
    a.load(Size::W, R0, FOUND, OWN_STAGE);
    a.jump_if(R0, If::Eq, STAGE_YOUNG, young);
    a.jump_if(R0, If::Eq, STAGE_REQUEST, unanswered);
    a.load(Size::W, R0, FOUND, OWN_KIND);
    a.jump_if(R0, If::Eq, KIND_LASTING, lasting);
    jump_if_within(a, (FOUND, OWN_SEEN), OWN_IDLE, in_time);
    a.jump(forget);
    a.bind(young);
    jump_if_within(a, (FOUND, OWN_SEEN), YOUNG_IDLE, in_time);
    a.jump(forget);
    a.bind(lasting);
    jump_if_within(a, (FOUND, OWN_SEEN), OWN_LASTING, ask);
    a.jump(forget);
    a.bind(in_time);
    a.load(Size::W, R0, FOUND, OWN_KIND);
    a.jump_if(R0, If::Ne, KIND_SOCKET, goes_on);
    a.bind(ask);
    look_up_socket(a, Helper::SkLookupUdp);
    a.jump_if_wide(R0, If::Eq, 0, gone);
    a.mov(R1, R0);
    a.call(Helper::SkRelease);
    a.bind(goes_on);
    a.jump_if(FRAGMENT, If::Eq, QUOTED, stay);
    a.load(Size::W, R0, FOUND, OWN_STAGE);
    a.jump_if(R0, If::Ne, STAGE_PLAIN, stay);
    a.mov(R0, STAGE_HEARD);
    a.store(Size::W, FOUND, OWN_STAGE, R0);
    a.jump(stay);

    a.bind(tcp);
    load_syn(a);
    a.jump_if(R0, If::Eq, i32::from(SYN), begins);
    a.load(Size::W, R0, FOUND, OWN_KIND);
    a.jump_if(R0, If::Eq, KIND_CLOSED, stay);
    jump_if_within(a, (FOUND, OWN_SEEN), OWN_IDLE_TCP, tcp_goes_on);
    a.jump(forget);
    a.bind(tcp_goes_on);
    let reset = a.label();
    a.jump_if(FRAGMENT, If::Eq, QUOTED, stay);
    a.load(Size::W, R0, R10, FLAGS);
    a.jump_if(R0, If::Set, i32::from(RST), reset);
    a.load(Size::W, R1, FOUND, OWN_KIND);
    a.jump_if(R1, If::Ne, KIND_OPENING, stay);
    a.alu(Alu::And, R0, i32::from(ACK));
    a.jump_if(R0, If::Eq, 0, stay);
    a.load(Size::W, R0, R10, HEADER + tcp::ACKNOWLEDGMENT as i16);
    a.swap_if_little_endian(R0);
    a.load(Size::W, R1, FOUND, OWN_STAGE);
    a.alu(Alu::Sub, R0, R1);
    a.jump_if(R0, If::Gt, ACKNOWLEDGED, stay);
    if let Some(served) = served {
        // A SYN-ACK would answer what that host has begun.
        let called = a.label();
        a.load(Size::W, R0, R10, FLAGS);
        a.jump_if(R0, If::Set, i32::from(SYN), called);
        served.enter_client(a);
        a.bind(called);
    }
    Own::make_value(a, KIND_BEHIND, STAGE_PLAIN);
    own.keep(a, full);
    a.bind(full);
    a.jump(stay);
    // It is over, or somebody has forged this: then its host will go on.
    a.bind(reset);
    a.load(Size::W, R0, FOUND, OWN_KIND);
    a.jump_if(R0, If::Ne, KIND_BEHIND, stay);
    Own::make_value(a, KIND_BEHIND, STAGE_RESET);
    own.enter_value(a);
    remove(a, &own.kept);
    a.jump(stay);
    a.bind(begins);
    a.load(Size::W, R0, FOUND, OWN_KIND);
    a.jump_if(R0, If::Eq, KIND_CLOSED, forget);
    jump_if_within(a, (FOUND, OWN_SEEN), OWN_IDLE, stay);
    // A forged SYN must not end what is merely idle: whoever has it may answer first.
    let asked = a.label();
    a.alu(Alu::Rsh, R0, ASKED_TICK);
    a.load(Size::W, R1, FOUND, OWN_KIND);
    a.jump_if(R1, If::Eq, KIND_ASKED, asked);
    a.store(Size::W, FOUND, OWN_STAGE, R0);
    a.mov(R0, KIND_ASKED);
    a.store(Size::W, FOUND, OWN_KIND, R0);
    a.jump(stay);
    a.bind(asked);
    a.load(Size::W, R1, FOUND, OWN_STAGE);
    a.alu(Alu::Sub, R0, R1);
    a.jump_if_wide(R0, If::Lt, ASKED_TICKS, stay);
    a.bind(forget);
    a.bind(gone);
    own.forget(a);
}

/// Jumps to `stay` if a socket of this host has a connection with the sender, or is about to; to
/// `anew` if the sender begins one in place of what was closed.
pub(super) fn ask_sockets(a: &mut Assembler, stay: Label, anew: Label) {
    let (udp, nobody, waits) = (a.label(), a.label(), a.label());
    a.jump_if(PROTOCOL, If::Eq, i32::from(UDP), udp);
    a.jump_if(PROTOCOL, If::Ne, i32::from(TCP), nobody);
    look_up_socket(a, Helper::SkcLookupTcp);
    a.jump_if_wide(R0, If::Eq, 0, nobody);
    release_keeping_state(a, FOUND);
    a.jump_if(FOUND, If::Eq, sock::LISTEN, nobody);
    a.jump_if(FOUND, If::Ne, sock::TIME_WAIT, stay);
    load_syn(a);
    a.jump_if(R0, If::Ne, i32::from(SYN), stay);
    a.jump(anew);
    a.bind(udp);
    look_up_socket(a, Helper::SkLookupUdp);
    a.jump_if_wide(R0, If::Eq, 0, waits);
    release_keeping_state(a, FOUND);
    a.jump_if(FOUND, If::Eq, sock::ESTABLISHED, stay);
    a.bind(waits);
    a.bind(nobody);
}

/// Notes that the new server has answered, if the packet is an answer without TCP to what was
/// captured. Goes on in any case, with nothing but the packet in any register.
///
/// ```text
/// if (TCP) go on;
/// if (it has no options or extension headers, and is no fragment) {
///     hash = ip.saddr + ip.daddr + ports;               // of IPv6 the last words
///     if (noted[hash] == { hash, now / 256 ticks }) go on;
///     noted[hash] = { hash, now / 256 ticks };
/// }
/// parse();                                              // quoted, later, none, other: go on
/// if (!ICMP && (t = lookup(taken, key))) t->answered = now;
/// ```
pub(super) fn note_answered(a: &mut Assembler, l2: u32, own: &Own, modes: Option<&Modes>) {
    let ways = Ways::new(a);
    let (v6, hashed, read, done) = (a.label(), a.label(), a.label(), a.label());
    jump_if_v6(a, v6);
    a.load_packet(Size::B, l2 + ipv4::PROTOCOL);
    a.jump_if(R0, If::Eq, i32::from(TCP), done);
    a.jump_if(R0, If::Ne, i32::from(UDP), read);
    a.load_packet(Size::B, l2 + ipv4::VERSION_AND_IHL);
    a.jump_if(R0, If::Ne, ipv4::WITHOUT_OPTIONS, read);
    // A fragment may be shorter than a header.
    a.load_packet(Size::H, l2 + ipv4::FLAGS_AND_OFFSET);
    a.jump_if(R0, If::Set, ipv4::FRAGMENTED, read);
    hash(
        a,
        [l2 + ipv4::SOURCE, l2 + ipv4::DESTINATION, l2 + ipv4::LEN],
    );
    a.jump(hashed);
    a.bind(v6);
    const LAST_WORD: u32 = 12;
    a.load_packet(Size::B, l2 + ipv6::NEXT_HEADER);
    a.jump_if(R0, If::Eq, i32::from(TCP), done);
    a.jump_if(R0, If::Ne, i32::from(UDP), read);
    hash(
        a,
        [
            l2 + ipv6::SOURCE + LAST_WORD,
            l2 + ipv6::DESTINATION + LAST_WORD,
            l2 + ipv6::LEN,
        ],
    );
    a.bind(hashed);
    jump_if_just_noted(a, own, read, done);

    a.bind(read);
    parse(a, l2, Side::Host, ways);
    a.bind(ways.flow);
    let (icmp, enter_it, made, known) = (a.label(), a.label(), a.label(), a.label());
    a.jump_if(PROTOCOL, If::Eq, i32::from(TCP), done);
    jump_if_icmp(a, icmp);
    a.bind(made);
    look_up(a, &own.taken);
    a.jump_if_wide(R0, If::Ne, 0, known);
    if let Some(modes) = modes {
        modes.jump_if_plain(a, done);
        // What is bounced does not come from what has moved.
        modes.look_up_scope(a, KEY_LOCAL);
        a.jump_if_wide(R0, If::Ne, 0, enter_it);
    }
    a.jump(done);
    a.bind(enter_it);
    // A conversation that this host has stays its own, whoever else speaks in it.
    own.look_up(a, done);
    enter_now(a, &own.taken);
    a.jump(done);
    a.bind(known);
    a.mov(FOUND, R0);
    a.call(Helper::KtimeGetNs);
    a.store(Size::Dw, FOUND, 0, R0);
    a.jump(done);
    a.bind(icmp);
    if let Some(modes) = modes {
        modes.jump_if_plain(a, done);
        mark_as_of_client(a);
        a.jump(made);
    }
    a.jump(done);
    a.bind(ways.none);
    if let Some(modes) = modes {
        modes.jump_if_plain(a, done);
        key_of_other_query(a, Side::Host, made);
    }
    for label in [ways.later, ways.quoted, ways.other, done] {
        a.bind(label);
    }
}

/// Notes that the daemon has bounced a packet: what it asks is not the new server's, and this host
/// is asked. Later fragments follow it.
pub(super) fn note_bounced(a: &mut Assembler, l2: u32, facts: &Facts) {
    let (own, modes) = (&facts.own, &facts.modes);
    let ways = Ways::new(a);
    let (done, first) = (a.label(), a.label());
    modes.jump_if_plain(a, done);
    parse(a, l2, Side::Remote, ways);
    a.bind(ways.none);
    key_of_other_query(a, Side::Remote, ways.flow);
    a.jump(done);
    a.bind(ways.flow);
    remove(a, &own.taken);
    a.jump_if(PROTOCOL, If::Eq, i32::from(TCP), first);
    Modes::tell(a);
    a.load(Size::W, R0, R10, TELLS);
    a.jump_if(R0, If::Ne, BEGINS, first);
    own.look_up(a, first);
    note_request(a, own);
    a.bind(first);
    remember_first_fragment(a, &own.fragments, done);
    for label in [ways.later, ways.quoted, ways.other, done] {
        a.bind(label);
    }
}

/// R8 = a hash of three words of the packet.
fn hash(a: &mut Assembler, words: [u32; 3]) {
    a.mov(R8, 0);
    for word in words {
        a.load_packet(Size::W, word);
        a.alu(Alu::Add, R8, R0);
    }
}

/// Goes on if no answer with the hash in R8 was noted of late: from then on it was. Jumps to `done`
/// otherwise, and to `read` if that is not known.
fn jump_if_just_noted(a: &mut Assembler, own: &Own, read: Label, done: Label) {
    a.mov(R0, R8);
    a.alu(Alu::Rsh, R0, 16);
    a.alu(Alu::Xor, R0, R8);
    a.alu(Alu::And, R0, (MAX_NOTED - 1) as i32);
    a.store(Size::W, R10, VALUE, R0);
    look_up_at(a, &own.noted, VALUE);
    a.jump_if_wide(R0, If::Eq, 0, read);
    a.mov(R7, R0);
    a.call(Helper::Jiffies64);
    a.alu(Alu::Rsh, R0, 8);
    a.alu(Alu::Lsh, R8, 32);
    a.alu(Alu::Xor, R8, R0);
    a.load(Size::Dw, R1, R7, 0);
    a.jump_if_wide(R1, If::Eq, R8, done);
    a.store(Size::Dw, R7, 0, R8);
}

#[cfg(test)]
mod tests {
    use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
    use std::os::fd::{AsFd, OwnedFd};
    use std::time::Duration;

    use super::*;
    use crate::kernel::bpf::test_run::nanoseconds;
    use crate::kernel::netlink::{Address, Netlink};
    use crate::kernel::programs::flows::now;
    use crate::kernel::programs::testing::{
        L2, OldServer, Packet, ago, frame, icmp, moves, ports, taken, tcp,
    };
    use crate::kernel::programs::{Facts, note_own};
    use crate::kernel::testing::in_fresh_namespace;
    use crate::lab::wiring::Wiring;
    use crate::packet::{ACK, FIN, PSH, RST};

    /// From which two whole addresses have moved, running for long.
    fn old_server() -> OldServer {
        with(&["192.0.2.5", "2001:db8:a::5"])
    }

    fn just_started() -> OldServer {
        of(&["192.0.2.5", "2001:db8:a::5"])
    }

    /// From which this has moved, running for long.
    fn with(moved: &[&str]) -> OldServer {
        let old = of(moved);
        old.facts.own.begin_at(Duration::ZERO);
        old
    }

    fn of(moved: &[&str]) -> OldServer {
        let facts = Facts::new(&moves(moved)).expect("run the tests as root");
        OldServer::new(facts)
    }

    /// The moved address, somebody else's, and the protocol of ICMP with its echo.
    const ENDS: [(&str, &str, u8, [u8; 2]); 2] = [
        ("192.0.2.5", "203.0.113.7", 1, [8, 0]),
        ("2001:db8:a::5", "2001:db8:c::7", 58, [128, 129]),
    ];

    #[test]
    fn what_this_host_begins_stays_and_everything_else_is_taken() {
        let old = old_server();
        for (moved, remote, protocol, [ping, pong]) in ENDS {
            let out = |protocol, payload| Packet::new(moved, remote, protocol, payload);
            let back = |protocol, payload| Packet::new(remote, moved, protocol, payload);
            for (protocol, question, answer, other) in [
                (UDP, ports(40_000, 53), ports(53, 40_000), ports(53, 40_001)),
                (UDP, ports(123, 123), ports(123, 123), ports(124, 123)),
                (protocol, icmp(ping, 7), icmp(pong, 7), icmp(pong, 8)),
                (47, ports(1, 2), ports(3, 4), ports(5, 6)),
            ] {
                let answer = back(protocol, answer);
                let before = old.is_taken(&answer);
                assert!(before, "{answer:?}");
                old.sends(&out(protocol, question));
                assert!(!old.is_taken(&answer), "{answer:?}");
                let elsewhere = back(protocol, other);
                assert_eq!(old.is_taken(&elsewhere), protocol != 47, "{elsewhere:?}");
            }
            // A client's ping with the same identifier is no answer.
            assert!(old.is_taken(&back(protocol, icmp(ping, 7))));
            // Nor does answering one make it this host's.
            old.sends(&out(protocol, icmp(pong, 9)));
            assert!(old.is_taken(&back(protocol, icmp(pong, 9))));
        }
    }

    #[test]
    fn errors_go_where_the_packet_went_that_they_quote() {
        let old = old_server();
        for (moved, remote, protocol, [ping, _]) in ENDS {
            for (protocol, mine, theirs) in [
                (UDP, ports(40_000, 53), ports(80, 53)),
                (TCP, tcp(40_000, 443, SYN), tcp(80, 443, ACK)),
                (protocol, icmp(ping, 7), icmp(ping, 8)),
            ] {
                let mine = Packet::new(moved, remote, protocol, mine);
                old.sends(&mine);
                assert!(
                    !old.is_taken(&Packet::icmp_error(remote, &mine)),
                    "{mine:?}"
                );
                let theirs = Packet::new(moved, remote, protocol, theirs);
                assert!(
                    old.is_taken(&Packet::icmp_error(remote, &theirs)),
                    "{theirs:?}"
                );
            }
        }
    }

    #[test]
    fn who_spoke_first_decides() {
        let old = old_server();
        for (moved, remote, ..) in ENDS {
            for (protocol, port) in [(UDP, 5060), (47, 0)] {
                let request = Packet::new(remote, moved, protocol, ports(port, port));
                let reply = Packet::new(moved, remote, protocol, ports(port, port));
                // What the old service still sends takes no flow away that the new server has.
                assert!(old.is_taken(&request));
                old.answers(&reply);
                old.sends(&reply);
                assert!(old.is_taken(&request), "{request:?}");
            }
            // But who forges a request makes none.
            let answer = Packet::new(remote, moved, UDP, ports(53, 41_000));
            for _ in 0..3 {
                assert!(old.is_taken(&answer));
            }
            old.sends(&Packet::new(moved, remote, UDP, ports(41_000, 53)));
            assert!(!old.is_taken(&answer));
        }
    }

    #[test]
    fn an_answer_to_what_came_before_the_start_keeps_no_client() {
        let old = just_started();
        let young = ago(YOUNG_IDLE);
        for (moved, remote, ..) in ENDS {
            let request = Packet::new(remote, moved, UDP, ports(5060, 5060));
            let reply = Packet::new(moved, remote, UDP, ports(5060, 5060));
            old.sends(&reply);
            assert!(!old.is_taken(&request), "it may be an own one");
            old.facts.own.age(young);
            assert!(old.is_taken(&request));
            old.answers(&reply);
            old.sends(&reply);
            assert!(old.is_taken(&request));
        }
        // If this host goes on first, it is its own.
        let (moved, remote, ..) = ENDS[0];
        let (mine, answer) = (ports(123, 123), ports(123, 123));
        let mine = Packet::new(moved, remote, UDP, mine);
        let answer = Packet::new(remote, moved, UDP, answer);
        old.sends(&mine);
        old.facts.own.age(young);
        old.facts.own.begin_at(Duration::ZERO);
        old.sends(&mine);
        assert!(!is_taken_at_last(&old, &answer));
    }

    /// Whether it is taken when every conversation has been silent for almost as long as it may be.
    fn is_taken_at_last(old: &OldServer, packet: &Packet) -> bool {
        loop {
            let left = Duration::from_secs(9);
            let begun = now();
            old.facts.own.age(ago(OWN_IDLE - left));
            let is_taken = old.is_taken(packet);
            // Else the machine stood still meanwhile, and nothing is known.
            if now() - begun < left {
                return is_taken;
            }
        }
    }

    #[test]
    fn a_conversation_ends_when_this_host_falls_silent() {
        let old = old_server();
        let (moved, remote, ..) = ENDS[0];
        let answer = Packet::new(remote, moved, UDP, ports(5060, 5060));
        let mine = Packet::new(moved, remote, UDP, ports(5060, 5060));
        old.sends(&mine);
        assert!(!is_taken_at_last(&old, &answer));
        old.facts.own.age(ago(OWN_IDLE));
        assert!(old.is_taken(&answer));
    }

    #[test]
    fn tcp_behind_this_host_is_known_by_its_packets() {
        let old = old_server();
        for (moved, remote, ..) in ENDS {
            let out = |flags| Packet::new(moved, remote, TCP, tcp(40_000, 443, flags));
            let back = |flags| Packet::new(remote, moved, TCP, tcp(443, 40_000, flags));
            for begins in [SYN, ACK | PSH] {
                assert!(old.is_taken(&back(SYN)), "somebody forged it");
                old.sends(&out(begins));
                for flags in [SYN | ACK, ACK, FIN | ACK, SYN] {
                    assert!(!old.is_taken(&back(flags)), "{begins} {flags}");
                }
                // Closed by this side; the other may still send.
                old.sends(&out(FIN | ACK));
                old.sends(&out(ACK));
                assert!(!old.is_taken(&back(ACK | PSH)));
                // A client with the same ports.
                assert!(old.is_taken(&back(SYN)));
                assert!(old.is_taken(&back(ACK)));
                old.sends(&out(SYN));
                assert!(!old.is_taken(&back(SYN | ACK)));
                old.sends(&out(RST));
                assert!(old.is_taken(&back(SYN)));
            }
            // A client that was captured, whatever the old service sends to it.
            let client = |flags| Packet::new(remote, moved, TCP, tcp(50_000, 80, flags));
            assert!(old.is_taken(&client(SYN)));
            assert!(old.is_taken(&client(ACK)));
            old.sends(&Packet::new(moved, remote, TCP, tcp(80, 50_000, ACK | PSH)));
            assert!(old.is_taken(&client(ACK)));
        }
    }

    #[test]
    fn an_idle_connection_ends_only_if_nobody_answers_for_it() {
        let old = old_server();
        let idle = ago(OWN_IDLE);
        for (moved, remote, ..) in ENDS {
            let out = |flags| Packet::new(moved, remote, TCP, tcp(40_000, 443, flags));
            let back = |flags| Packet::new(remote, moved, TCP, tcp(443, 40_000, flags));
            old.sends(&out(SYN));
            old.facts.own.age(idle);
            for _ in 0..3 {
                assert!(!old.is_taken(&back(SYN)), "asked");
            }
            // It answers.
            old.sends(&out(ACK));
            old.facts.own.asked_earlier(ASKED_TICKS);
            assert!(!old.is_taken(&back(SYN)), "it has spoken");
            old.facts.own.age(idle);
            old.facts.own.asked_earlier(ASKED_TICKS);
            assert!(!old.is_taken(&back(SYN)), "asked again");
            assert!(!old.is_taken(&back(ACK | PSH)));
            // It does not.
            old.facts.own.asked_earlier(ASKED_TICKS);
            assert!(old.is_taken(&back(SYN)));
            assert!(old.is_taken(&back(ACK)));
        }
    }

    #[test]
    fn what_is_never_captured_takes_no_room() {
        let moves = moves(&["192.0.2.5:443/tcp", "[2001:db8:a::5]:443/tcp"]);
        let facts = Facts::new(&moves).expect("run the tests as root");
        let egress = note_own(&facts, L2, 1, Some(51820)).unwrap();
        let egress = egress.load().unwrap();
        let sends = |packet| assert!(!taken(egress.as_fd(), &packet));
        for (moved, remote, icmp_protocol, [ping, _]) in ENDS {
            sends(Packet::new(moved, remote, UDP, ports(53, 40_000)));
            sends(Packet::new(moved, remote, icmp_protocol, icmp(ping, 7)));
            sends(Packet::new(moved, remote, 47, ports(1, 2)));
            sends(Packet::new(moved, remote, TCP, tcp(40_000, 443, ACK)));
        }
        assert_eq!((facts.own.len(), facts.own.others()), (0, 0));
        for (moved, remote, ..) in ENDS {
            sends(Packet::new(moved, remote, TCP, tcp(443, 40_000, ACK)));
        }
        assert_eq!(facts.own.len(), ENDS.len());
    }

    #[test]
    fn ports_that_have_not_moved_take_room_for_their_fragments_only() {
        let old = with(&["192.0.2.5:443,8000-8100", "[2001:db8:a::5]:443/udp"]);
        for (at, (moved, remote, ..)) in (1..).zip(ENDS) {
            let to = |port| Packet::new(remote, moved, UDP, ports(4000, port));
            let part = |packet: Packet, id, offset, more| Packet {
                fragment: Some((id, offset, more)),
                ..packet
            };
            let noise = || Packet::new(remote, moved, UDP, ports(1, 2));
            assert!(old.is_taken(&part(to(53), 4, 0, true)), "a client's");
            for port in [442, 444, 53, 65_535] {
                old.sends(&Packet::new(moved, remote, UDP, ports(port, 4000)));
                assert!(!old.is_taken(&to(port)), "{port} has not moved");
            }
            assert_eq!(
                (old.facts.own.len(), old.facts.own.others()),
                (at - 1, 4 * at)
            );
            assert!(old.is_taken(&part(noise(), 5, 3, true)));
            assert!(!old.is_taken(&part(to(444), 5, 0, true)));
            assert!(!old.is_taken(&part(noise(), 5, 3, true)));
            assert!(!old.is_taken(&part(noise(), 5, 6, false)));
            let another = Packet::new(remote, moved, UDP, ports(4001, 444));
            assert!(
                old.is_taken(&part(another, 6, 0, true)),
                "nobody spoke to it"
            );
            assert!(old.is_taken(&part(noise(), 6, 3, true)));
            old.sends(&Packet::new(moved, remote, UDP, ports(443, 4000)));
            assert_eq!(old.facts.own.len(), at);
            assert!(!old.is_taken(&to(443)), "this host began it");
            assert!(!old.is_taken(&part(to(443), 7, 0, true)));
        }
    }

    #[test]
    fn fragments_follow_the_first() {
        let old = old_server();
        for (moved, remote, ..) in ENDS {
            let part = |ports, id, offset, more| Packet {
                fragment: Some((id, offset, more)),
                ..Packet::new(remote, moved, UDP, ports)
            };
            let (mine, noise) = (|| ports(53, 40_000), || ports(1, 2));
            old.sends(&Packet::new(moved, remote, UDP, ports(40_000, 53)));
            assert!(old.is_taken(&part(noise(), 5, 3, true)));
            assert!(!old.is_taken(&part(mine(), 5, 0, true)));
            assert!(!old.is_taken(&part(noise(), 5, 3, true)));
            assert!(old.is_taken(&part(noise(), 6, 3, true)));
            assert!(!old.is_taken(&part(noise(), 5, 6, false)));
            assert!(
                old.is_taken(&part(noise(), 5, 3, true)),
                "that was the last"
            );
            assert!(!old.is_taken(&part(mine(), 5, 0, true)));
            assert!(old.is_taken(&part(ports(99, 99), 5, 0, true)));
            assert!(old.is_taken(&part(noise(), 5, 3, true)));
            // The new server's answers may end in very short ones.
            old.answers(&Packet {
                fragment: Some((5, 185, false)),
                ..Packet::new(moved, remote, UDP, vec![0])
            });
        }
    }

    #[test]
    fn answers_of_a_dhcp_server_stay() {
        let old = old_server();
        for (moved, remote, ..) in ENDS {
            for (server, client, stays) in [
                (67, 68, true),
                (4011, 68, true),
                (547, 546, true),
                (68, 67, false),
            ] {
                let packet = Packet::new(remote, moved, UDP, ports(server, client));
                assert_eq!(!old.is_taken(&packet), stays, "{server} {client}");
            }
        }
    }

    /// Gives this namespace the moved addresses and those of others.
    fn addresses() {
        let netlink = Netlink::new().unwrap();
        netlink.set_link_up(1).unwrap();
        for (moved, remote, ..) in ENDS {
            for addr in [moved, remote] {
                let addr = addr.parse().unwrap();
                let prefix = if moved.contains(':') { 128 } else { 32 };
                let (index, addr) = (1, addr);
                netlink
                    .add_address(&Address {
                        index,
                        addr,
                        prefix,
                    })
                    .unwrap();
            }
        }
    }

    fn end(addr: &str, port: u16) -> SocketAddr {
        SocketAddr::new(addr.parse().unwrap(), port)
    }

    #[test]
    fn sockets_of_this_host_keep_what_is_theirs() {
        in_fresh_namespace(|| {
            addresses();
            let old = old_server();
            for (moved, remote, ..) in ENDS {
                // A service, which still listens, has a connection.
                let service = TcpListener::bind(end(moved, 80)).unwrap();
                let client = TcpStream::connect(end(moved, 80)).unwrap();
                let from = client.local_addr().unwrap();
                let there = from.ip().to_string();
                let packet = |flags| Packet::new(&there, moved, TCP, tcp(from.port(), 80, flags));
                for flags in [SYN, ACK, ACK | PSH, FIN | ACK, RST] {
                    assert!(!old.is_taken(&packet(flags)), "{flags}");
                }
                let new = |flags| Packet::new(remote, moved, TCP, tcp(40_000, 80, flags));
                for flags in [SYN, ACK] {
                    assert!(old.is_taken(&new(flags)), "{flags}");
                }
                // The service closes first, and has the connection in TIME_WAIT.
                drop(service.accept().unwrap());
                drop(client);
                std::thread::sleep(Duration::from_millis(20));
                assert!(!old.is_taken(&packet(FIN | ACK)));
                assert!(old.is_taken(&packet(SYN)));
                assert!(old.is_taken(&packet(ACK)));

                // A connection of its own, from the moved address.
                let service = TcpListener::bind(end(remote, 443)).unwrap();
                let mine = socket2::Socket::new(
                    socket2::Domain::for_address(end(moved, 0)),
                    socket2::Type::STREAM,
                    None,
                );
                let mine = mine.unwrap();
                mine.bind(&end(moved, 0).into()).unwrap();
                mine.connect(&end(remote, 443).into()).unwrap();
                let port = mine.local_addr().unwrap().as_socket().unwrap().port();
                let back = |flags| Packet::new(remote, moved, TCP, tcp(443, port, flags));
                assert!(!old.is_taken(&back(ACK)));
                drop((mine, service));

                // UDP, connected and not.
                let question = UdpSocket::bind(end(moved, 0)).unwrap();
                let port = question.local_addr().unwrap().port();
                let answer = Packet::new(remote, moved, UDP, ports(53, port));
                let another = Packet::new(remote, moved, UDP, ports(54, port));
                assert!(old.is_taken(&another));
                question.connect(end(remote, 53)).unwrap();
                assert!(!old.is_taken(&answer));
                assert!(old.is_taken(&another));
                drop(question);
                assert!(old.is_taken(&answer), "nobody waits any more");
            }
        });
    }

    #[test]
    fn a_peer_with_a_fixed_port_may_be_silent_for_hours_while_the_socket_is_there() {
        in_fresh_namespace(|| {
            addresses();
            let old = old_server();
            let silent = |time| old.facts.own.age(ago(time));
            let nearly = OWN_LASTING - Duration::from_secs(60);
            for (moved, remote, ..) in ENDS {
                let call = Packet::new(remote, moved, UDP, ports(5060, 5060));
                let mine = Packet::new(moved, remote, UDP, ports(5060, 5060));
                for service in [moved, "::"] {
                    let trunk = UdpSocket::bind(end(service, 5060)).unwrap();
                    old.sends(&mine);
                    silent(nearly);
                    assert!(!old.is_taken(&call));
                    // It goes on after a long silence, as what it was.
                    old.sends(&mine);
                    silent(nearly);
                    assert!(!old.is_taken(&call));
                    silent(OWN_LASTING);
                    assert!(old.is_taken(&call), "two hours");
                    // The new server does not answer.
                    old.sends(&mine);
                    silent(nearly);
                    assert!(!old.is_taken(&call));
                    drop(trunk);
                    assert!(old.is_taken(&call), "the socket is closed");
                    old.sends(&mine);
                    silent(OWN_IDLE);
                    assert!(
                        old.is_taken(&call),
                        "a host behind this one has no socket here"
                    );
                }
            }
        });
    }

    #[test]
    fn who_was_merely_answered_is_not_kept_for_hours() {
        in_fresh_namespace(|| {
            addresses();
            let old = old_server();
            let kept = Duration::from_secs(9);
            for (moved, remote, ..) in ENDS {
                let request = Packet::new(remote, moved, UDP, ports(5060, 5060));
                let reply = Packet::new(moved, remote, UDP, ports(5060, 5060));
                let moves_over = || {
                    old.facts.own.age(ago(OWN_IDLE - kept));
                    assert!(!old.is_taken(&request));
                    old.facts.own.age(ago(OWN_IDLE));
                    assert!(old.is_taken(&request));
                };
                let service = UdpSocket::bind(end(moved, 5060)).unwrap();
                // The old service goes on answering what came before the start.
                for since in [Duration::from_secs(2), OWN_IDLE - kept] {
                    old.facts.own.begin_at(ago(since));
                    old.facts.own.forget_taken();
                    old.sends(&reply);
                    old.facts.own.begin_at(Duration::ZERO);
                    old.sends(&reply);
                    moves_over();
                }
                drop(service);
                // One socket for each client, and one that waits for others.
                old.facts.own.forget_taken();
                let client = UdpSocket::bind(end(moved, 5060)).unwrap();
                client.connect(end(remote, 5060)).unwrap();
                old.sends(&reply);
                old.facts.own.age(ago(OWN_IDLE));
                assert!(!old.is_taken(&request), "the socket is connected");
                old.sends(&reply);
                drop(client);
                let service = UdpSocket::bind(end(moved, 5060)).unwrap();
                moves_over();
                drop(service);
            }
        });
    }

    #[test]
    #[ignore = "a measurement"]
    fn what_the_question_costs() {
        in_fresh_namespace(|| {
            addresses();
            let old = old_server();
            for (moved, remote, ..) in ENDS {
                let cost = |program: &OwnedFd, packet: &Packet| {
                    nanoseconds(program.as_fd(), &frame(&packet.bytes()))
                };
                let udp = Packet::new(remote, moved, UDP, ports(4000, 53));
                let ack = Packet::new(remote, moved, TCP, tcp(4000, 80, ACK));
                let syn = Packet::new(remote, moved, TCP, tcp(4001, 80, SYN));
                let reply = Packet::new(moved, remote, UDP, ports(53, 4000));
                let tcp_reply = Packet::new(moved, remote, TCP, tcp(80, 4000, ACK));
                let mine = Packet::new(moved, remote, UDP, ports(40_000, 53));
                let answer = Packet::new(remote, moved, UDP, ports(53, 40_000));
                eprintln!(
                    "udp {} ack {} syn {}",
                    cost(&old.capture, &udp),
                    cost(&old.capture, &ack),
                    cost(&old.capture, &syn)
                );
                eprintln!(
                    "answered: udp {} tcp {}",
                    cost(&old.answers, &reply),
                    cost(&old.answers, &tcp_reply)
                );
                eprintln!(
                    "egress: mine {}; tunnel {}; not moved {}",
                    cost(&old.egress, &mine),
                    cost(
                        &old.egress,
                        &Packet::new(moved, remote, UDP, ports(51820, 51820))
                    ),
                    cost(
                        &old.egress,
                        &Packet::new("192.0.2.1", "203.0.113.7", UDP, ports(5, 6))
                    )
                );
                eprintln!("own answer {}", cost(&old.capture, &answer));
                let in_part = with(&["192.0.2.5:443", "[2001:db8:a::5]:443"]);
                eprintln!(
                    "egress, in part: moved {}; not moved {}",
                    cost(
                        &in_part.egress,
                        &Packet::new(moved, remote, UDP, ports(443, 4000))
                    ),
                    cost(&in_part.egress, &reply)
                );
                let service = UdpSocket::bind(end(moved, 53)).unwrap();
                let listener = TcpListener::bind(end(moved, 80)).unwrap();
                eprintln!("with a service: syn {}", cost(&old.capture, &syn));
                drop((service, listener));
            }
        });
    }
}
