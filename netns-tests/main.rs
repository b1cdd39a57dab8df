//! Tests on real kernels with real sockets.
