//! Times the cases of [`cases`] with criterion: `cargo bench --bench micro`.
//!
//! Times on a shared machine are noisy. `cargo bench --bench instructions` counts the same work.

#![allow(
    clippy::missing_docs_in_private_items,
    reason = "nothing here is used elsewhere"
)]

use std::process::ExitCode;
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput};

mod cases;

/// Long enough for a hundred thousand steps of the slowest case.
const MEASURED: Duration = Duration::from_secs(2);
const WARM_UP: Duration = Duration::from_millis(500);
const SAMPLES: usize = 20;

fn main() -> ExitCode {
    let mut criterion = Criterion::default()
        .measurement_time(MEASURED)
        .warm_up_time(WARM_UP)
        .sample_size(SAMPLES)
        .without_plots()
        .configure_from_args();
    for case in cases::all() {
        time(&mut criterion, &case);
    }
    criterion.final_summary();
    ExitCode::SUCCESS
}

#[allow(
    clippy::disallowed_methods,
    clippy::panic,
    reason = "a bench reads the clock, and if it cannot be set up it can only panic"
)]
fn time(criterion: &mut Criterion, case: &cases::Case) {
    let (group, function) = case.name.split_once('/').unwrap_or((case.name, ""));
    let mut group = criterion.benchmark_group(group);
    if case.bytes > 0 {
        group.throughput(Throughput::Bytes(case.bytes));
    }
    // The first run makes it, since a filter on the command line may leave the case out.
    let mut made = None;
    group.bench_function(function, |bencher| {
        let work = made.get_or_insert_with(|| {
            (case.build)().unwrap_or_else(|error| panic!("{}: {error:#}", case.name))
        });
        bencher.iter_custom(|steps| {
            let (mut left, mut took) = (steps, Duration::ZERO);
            while left > 0 {
                let round = left.min(u64::from(case.round));
                if let Err(error) = work.prepare() {
                    panic!("{}: {error:#}", case.name);
                }
                let started = Instant::now();
                for _ in 0..round {
                    work.step();
                }
                took += started.elapsed();
                left -= round;
            }
            took
        });
    });
    group.finish();
}
