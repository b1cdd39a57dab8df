//! Reads a value of the configuration file as the flag of its name reads it: by the one `FromStr`
//! of its type. So a key takes what the flag takes, and both refuse it in the same words.

use std::fmt;
use std::marker::PhantomData;
use std::str::FromStr;

use serde::de::{Deserialize, Deserializer, Error, SeqAccess, Visitor};

use crate::model::outgoing::{AllowOutgoing, Outgoing};

/// One value, for `#[serde(deserialize_with)]`: `"192.0.2.1:51850"` as well as `51850`.
pub(super) fn one<'de, D, T>(deserializer: D) -> Result<Option<T>, D::Error>
where
    D: Deserializer<'de>,
    T: FromStr<Err: fmt::Display>,
{
    FromText::deserialize(deserializer).map(|FromText(value)| Some(value))
}

/// Any number of values: `"192.0.2.5"` as well as `["192.0.2.5", "192.0.2.6"]`.
pub(super) fn many<'de, D, T>(deserializer: D) -> Result<Vec<T>, D::Error>
where
    D: Deserializer<'de>,
    T: FromStr<Err: fmt::Display>,
{
    deserializer.deserialize_any(ManyVisitor(PhantomData))
}

/// As [`many`], of a flag that may stand without a value: `true` is the value that it has then, and
/// `false` none.
pub(super) fn many_or_bare<'de, D, T>(deserializer: D) -> Result<Vec<T>, D::Error>
where
    D: Deserializer<'de>,
    T: FromStr<Err: fmt::Display> + Bare,
{
    deserializer.deserialize_any(BareVisitor(PhantomData))
}

/// A value whose flag may stand without it.
pub(super) trait Bare {
    /// What is meant then.
    const BARE: Self;
}

impl Bare for Outgoing {
    const BARE: Self = Self::Bound;
}

impl Bare for AllowOutgoing {
    const BARE: Self = Self::Any;
}

/// A value that is read by its `FromStr`.
struct FromText<T>(T);

impl<'de, T: FromStr<Err: fmt::Display>> Deserialize<'de> for FromText<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(OneVisitor(PhantomData))
    }
}

/// Parses inside the visitor, where the TOML parser still knows line and column.
struct OneVisitor<T>(PhantomData<T>);

impl<T: FromStr<Err: fmt::Display>> Visitor<'_> for OneVisitor<T> {
    type Value = FromText<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a text or a number")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<FromText<T>, E> {
        text.parse().map(FromText).map_err(E::custom)
    }

    fn visit_i64<E: Error>(self, number: i64) -> Result<FromText<T>, E> {
        self.visit_str(&number.to_string())
    }
}

struct ManyVisitor<T>(PhantomData<T>);

impl<'de, T: FromStr<Err: fmt::Display>> Visitor<'de> for ManyVisitor<T> {
    type Value = Vec<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a text, or a list of them in brackets")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Vec<T>, E> {
        Ok(vec![text.parse().map_err(E::custom)?])
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Vec<T>, A::Error> {
        let mut values = Vec::new();
        while let Some(FromText(value)) = list.next_element()? {
            values.push(value);
        }
        Ok(values)
    }
}

struct BareVisitor<T>(PhantomData<T>);

impl<'de, T: FromStr<Err: fmt::Display> + Bare> Visitor<'de> for BareVisitor<T> {
    type Value = Vec<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("true, a text, or a list of texts in brackets")
    }

    fn visit_bool<E: Error>(self, given: bool) -> Result<Vec<T>, E> {
        Ok(if given { vec![T::BARE] } else { Vec::new() })
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Vec<T>, E> {
        ManyVisitor(PhantomData).visit_str(text)
    }

    fn visit_i64<E: Error>(self, number: i64) -> Result<Vec<T>, E> {
        self.visit_str(&number.to_string())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<Vec<T>, A::Error> {
        ManyVisitor(PhantomData).visit_seq(list)
    }
}
