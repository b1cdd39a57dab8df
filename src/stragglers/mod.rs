//! Who still comes to what has moved: kept in a database, and judged when somebody asks.
//!
//! ```text
//! flow::visits ──► control task ──► writer ──► tally ──► store ──► stragglers.sqlite
//!                                    │ names                             │
//!                                    └ a thread of its own               ▼
//!                       ipmoved stragglers, verdict ◄── text ◄── findings, verdict ◄── history
//! ```
//!
//! | file | owns |
//! |---|---|
//! | [`writer`] | the thread that writes, and what becomes of it when it cannot |
//! | [`tally`] | what is added up until it is written, and who is listed at all |
//! | `names` | the name that a client's first bytes ask for |
//! | [`watch`] | which moves are watched, and since when |
//! | [`store`] | the database: its file, its form (`schema.sql`), what may be wrong with it |
//! | `rows` | what is added to each of its tables |
//! | [`history`] | what is in it, for those who ask |
//! | [`findings`] | who still comes |
//! | `rhythm` | whether somebody comes regularly |
//! | `trend` | where the number of clients leads to |
//! | [`verdict`] | whether the old server can be switched off |
//! | [`text`] | all this for people, and as CSV |
//! | [`report`] | the same as a page to show others |
//! | [`time`] | days, and times for people |
//!
//! Nothing here waits for packets, and no packet waits for anything here. What cannot be written is
//! kept, up to a bound, and counted beyond.

#![expect(
    clippy::disallowed_methods,
    reason = "an edge: it reads and writes files, on a thread of its own"
)]

pub mod findings;
pub mod history;
mod names;
pub mod report;
mod rhythm;
mod rows;
pub mod store;
pub mod tally;
#[cfg(test)]
mod tests;
pub mod text;
pub mod time;
mod trend;
pub mod verdict;
pub mod watch;
pub mod writer;
