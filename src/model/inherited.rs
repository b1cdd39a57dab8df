//! What is remembered of moves goes on where they are cut anew by other settings.
//!
//! Owns the question which of the moves of now come from which of before: the same one, or any
//! that it has something in common with.

use std::collections::HashMap;

use super::moved::Move;

/// Most moves of before with which each changed one is compared. With more, it is taken to come
/// from all of them: 16,384 moves compared with as many would take seconds.
const COMPARED: usize = 64;

/// What is remembered of each of `after`, in their order, if something was of `before`. What comes
/// from several gets both `together`.
pub fn inherited<T: Copy>(
    before: &[(&Move, T)],
    after: &[Move],
    together: impl Fn(T, T) -> T,
) -> Vec<Option<T>> {
    if before.is_empty() {
        return vec![None; after.len()];
    }
    let same: HashMap<&Move, T> = before.iter().copied().collect();
    let of = |moved: &Move| {
        let known = same.get(moved).copied();
        known.or_else(|| {
            let all = before.len() > COMPARED;
            let parts = before.iter().filter(|(it, _)| all || it.overlaps(moved));
            parts.map(|&(_, memory)| memory).reduce(&together)
        })
    };
    after.iter().map(of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn moves(texts: &[&str]) -> Vec<Move> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn what_is_cut_anew_has_what_its_parts_had() {
        let before = moves(&["192.0.2.5:80/tcp", "192.0.2.5:443/tcp", "192.0.2.6"]);
        let after = moves(&[
            "192.0.2.7",
            "192.0.2.6",
            "192.0.2.5:80,443/tcp",
            "192.0.2.6:53",
        ]);
        let before: Vec<_> = before.iter().zip([1, 2, 3]).collect();
        assert_eq!(
            inherited(&before, &after, i32::max),
            [None, Some(3), Some(2), Some(3)]
        );
        assert_eq!(inherited(&[], &after, i32::max), [None; 4]);
    }

    #[test]
    fn too_many_to_compare_count_all() {
        let many: Vec<Move> = (0..=COMPARED)
            .map(|number| format!("192.0.2.{number}").parse().unwrap())
            .collect();
        let before: Vec<_> = many.iter().map(|it| (it, 7)).collect();
        let after = moves(&["192.0.2.0", "198.51.100.1"]);
        assert_eq!(inherited(&before, &after, i32::max), [Some(7), Some(7)]);
    }
}
