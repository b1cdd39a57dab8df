//! The `ipmoved` command: see the library for everything it does.

use std::process::ExitCode;

fn main() -> ExitCode {
    ipmoved::command::main()
}
