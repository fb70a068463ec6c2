//! The services that a connection has been passed on from, waypoint to waypoint, so that no circle of routes carries it round
//! for ever.
//!
//! A waypoint that passes a connection on to another one's service names the service that was addressed here. A service
//! that is named already is not served again, and a way that is too long ends. What peers say can only shorten their own way.

use std::{fmt, sync::Arc};

use crate::names::{NamespacedHostname, Str};

/// Header of a CONNECT from waypoint to waypoint: `namespace/hostname`, separated by commas.
pub const HEADER: &str = "x-leyline-via";

/// Header of a CONNECT from waypoint to waypoint: the subset of the service's endpoints that the sender's route asks for. One
/// that keeps to it says so by the same header in its answer; one that does not is no way to the subset.
pub const SUBSET: &str = "x-leyline-subset";

/// Waypoints on one way.
const MOST: usize = 8;

/// Where a connection came by, the first first. Usually empty: it came from a client.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Via(Arc<[Str]>);

impl Via {
    /// Reads the header's values.
    pub fn parse<'a>(values: impl Iterator<Item = &'a str>) -> Self {
        let names = values.flat_map(|value| value.split(','));
        let names = names.map(str::trim).filter(|name| !name.is_empty());
        // One more than may be is enough to refuse.
        Self(names.take(MOST + 1).map(Str::from).collect())
    }

    /// Whether it came from another waypoint.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether a connection that came this way may go on to `service`.
    pub fn admits(&self, service: &NamespacedHostname) -> bool {
        let name = service.to_string();
        self.0.len() < MOST && !self.0.iter().any(|known| **known == *name)
    }

    /// The way of what is passed on from `service`.
    pub fn onward(&self, service: &NamespacedHostname) -> Self {
        let own = Str::from(service.to_string());
        Self(self.0.iter().cloned().chain([own]).collect())
    }
}

impl fmt::Display for Via {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, name) in self.0.iter().enumerate() {
            let comma = if at == 0 { "" } else { ", " };
            write!(f, "{comma}{name}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(name: &str) -> NamespacedHostname {
        format!("a/{name}.a.svc").parse().unwrap()
    }

    #[test]
    fn a_way_is_told_on_and_admits_nobody_twice() {
        let via = Via::default().onward(&service("x")).onward(&service("y"));
        assert_eq!(via.to_string(), "a/x.a.svc, a/y.a.svc");
        let read = Via::parse(["a/x.a.svc , a/y.a.svc,"].into_iter());
        assert_eq!(read, via);
        assert_eq!(Via::parse(["a/x.a.svc", "a/y.a.svc"].into_iter()), via);
        assert!(!via.admits(&service("x")) && !via.admits(&service("y")));
        assert!(via.admits(&service("z")) && !via.is_empty());
        assert!(Via::parse([].into_iter()).admits(&service("x")));
    }

    #[test]
    fn a_way_without_an_end_is_cut() {
        let long = vec!["a/b"; 1000].join(",");
        let via = Via::parse([&*long].into_iter());
        assert!(!via.admits(&service("x")));
        assert!(via.to_string().len() < 100);
        let mut via = Via::default();
        for at in 0..MOST {
            assert!(via.admits(&service("z")), "{at}");
            via = via.onward(&service(&format!("s{at}")));
        }
        assert!(!via.admits(&service("z")));
    }
}
