//! Threads that may not what tests may.

#![allow(unsafe_code, reason = "rights are given up by capset")]

/// What `f` answers on a thread that has no rights over networks: neither CAP_NET_ADMIN nor CAP_NET_RAW, nor any other.
///
/// # Panics
/// `f` does, or the rights cannot be given up.
pub fn without_network_rights<T: Send>(f: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            give_up_rights();
            f()
        });
        thread.join().expect("the thread has an answer")
    })
}

/// Of the calling thread alone: the system call knows no processes.
fn give_up_rights() {
    /// Version 3 of the call (`<linux/capability.h>`), and the thread: our own.
    const HEADER: [u32; 2] = [0x2008_0522, 0];
    /// Effective, permitted and inheritable rights, in two halves.
    const NONE: [u32; 6] = [0; 6];
    // SAFETY: both arrays have the layout that this version of the call reads, and outlive it.
    let result = unsafe { libc::syscall(libc::SYS_capset, HEADER.as_ptr(), NONE.as_ptr()) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}
