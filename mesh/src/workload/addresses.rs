//! The addresses of a record.

use std::{fmt, net::IpAddr, ops::Deref, slice};

use serde::{Deserialize, Serialize};

/// Addresses in their order. One, which is what most records have, takes no memory of its own.
#[derive(Clone, Serialize, Deserialize)]
#[serde(from = "Vec<IpAddr>", into = "Vec<IpAddr>")]
pub struct Addresses(Kept);

#[derive(Clone)]
enum Kept {
    One(IpAddr),
    Other(Box<[IpAddr]>),
}

impl Default for Addresses {
    fn default() -> Self {
        Self(Kept::Other(Box::default()))
    }
}

impl Deref for Addresses {
    type Target = [IpAddr];

    fn deref(&self) -> &[IpAddr] {
        match &self.0 {
            Kept::One(one) => slice::from_ref(one),
            Kept::Other(other) => other,
        }
    }
}

impl From<Vec<IpAddr>> for Addresses {
    fn from(all: Vec<IpAddr>) -> Self {
        Self(match *all {
            [one] => Kept::One(one),
            _ => Kept::Other(all.into()),
        })
    }
}

impl From<Addresses> for Vec<IpAddr> {
    fn from(addresses: Addresses) -> Self {
        addresses.to_vec()
    }
}

impl FromIterator<IpAddr> for Addresses {
    fn from_iter<I: IntoIterator<Item = IpAddr>>(all: I) -> Self {
        Vec::from_iter(all).into()
    }
}

impl PartialEq for Addresses {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

impl Eq for Addresses {}

impl fmt::Debug for Addresses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}
