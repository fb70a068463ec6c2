use std::{net::TcpListener, panic::catch_unwind, thread, time::Instant};

use super::*;
use crate::fixture::fresh_netns;

#[test]
fn an_ordinary_file_is_no_namespace() {
    let file = tempfile::NamedTempFile::new().expect("a file");
    let error = Netns::open(file.path()).expect_err("not a namespace");
    assert!(matches!(error, NetnsError::NotANamespace(_)), "{error:?}");
    let gone = Netns::open("/proc/self/no-such-file").expect_err("nothing there");
    assert!(matches!(gone, NetnsError::Open { .. }), "{gone:?}");
}

#[test]
fn two_descriptors_of_one_namespace_are_equal() {
    let here = Netns::current().expect("/proc");
    let again = Netns::open("/proc/self/ns/net").expect("/proc");
    assert_eq!(here, again);
    assert_eq!(here.id().to_string(), format!("net:[{}]", here.id().inode));
}

#[test]
fn a_namespace_of_another_kind_cannot_be_entered() {
    let other = Netns::open("/proc/self/ns/uts").expect("a namespace");
    let error = other.run(|| ()).expect_err("a uts namespace");
    assert!(matches!(error, NetnsError::Enter { .. }), "{error:?}");
}

fn inode_now() -> u64 {
    let meta = fs::metadata("/proc/thread-self/ns/net").expect("/proc");
    meta.ino()
}

#[test]
fn runs_inside_and_comes_back() {
    let Some(inside) = fresh_netns() else { return };
    let home = inode_now();
    let seen = inside.run(inode_now).expect("permitted");
    assert_eq!(seen, inside.id().inode);
    assert_eq!(inode_now(), home);
}

#[test]
fn comes_back_from_a_panic() {
    let Some(inside) = fresh_netns() else { return };
    let home = inode_now();
    catch_unwind(|| inside.run(|| panic!("on purpose"))).expect_err("it panics");
    assert_eq!(inode_now(), home);
}

#[test]
fn nests_and_comes_back_one_by_one() {
    let (Some(outer), Some(inner)) = (fresh_netns(), fresh_netns()) else {
        return;
    };
    let home = inode_now();
    let seen = outer.run(|| (inner.run(inode_now).expect("permitted"), inode_now()));
    assert_eq!(
        seen.expect("permitted"),
        (inner.id().inode, outer.id().inode)
    );
    assert_eq!(inode_now(), home);
}

#[test]
fn a_socket_stays_in_the_namespace_it_was_made_in() {
    let (Some(a), Some(b)) = (fresh_netns(), fresh_netns()) else {
        return;
    };
    let bind = || TcpListener::bind("127.0.0.1:7").expect("free in a namespace of its own");
    let first = a.run(bind).expect("permitted");
    let second = b.run(bind).expect("permitted");
    assert_eq!(first.local_addr().ok(), second.local_addr().ok());
}

#[test]
fn entering_for_good_moves_only_the_calling_thread() {
    let Some(inside) = fresh_netns() else { return };
    let (home, id) = (inode_now(), inside.id().inode);
    let moved = thread::spawn(move || {
        inside.enter().expect("permitted");
        (inode_now(), Netns::current().expect("known").id().inode)
    });
    assert_eq!(moved.join().expect("no panic"), (id, id));
    assert_eq!(inode_now(), home);
}

/// Not a limit, but a figure to see with `--nocapture`: what an outbound connection pays.
#[test]
fn a_visit_costs_microseconds() {
    const VISITS: u32 = 2_000;
    let Some(inside) = fresh_netns() else { return };
    let start = Instant::now();
    for _ in 0..VISITS {
        inside.run(|| ()).expect("permitted");
    }
    let each = start.elapsed() / VISITS;
    println!("a visit to a namespace: {each:?}");
    assert!(each.as_millis() < 5, "{each:?}");
}
