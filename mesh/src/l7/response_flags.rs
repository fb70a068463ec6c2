//! Envoy's response flags: what went wrong with a request, in two or three letters that users alert on.

use std::fmt;

/// One flag; the order is that of a list of several.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Flag {
    /// `LH`: the waypoint's own health check failed.
    LocalHealthCheck,
    /// `UH`: no healthy endpoint.
    NoHealthyUpstream,
    /// `UT`: the request ran out of its time.
    UpstreamRequestTimeout,
    /// `LR`: reset here.
    LocalReset,
    /// `UR`: reset by the backend.
    UpstreamRemoteReset,
    /// `UF`: no connection to a backend.
    UpstreamConnectionFailure,
    /// `UC`: the connection to the backend ended.
    UpstreamConnectionTermination,
    /// `UO`: a limit on the backend was reached.
    UpstreamOverflow,
    /// `NR`: no route.
    NoRoute,
    /// `DI`: delayed on purpose.
    DelayInjected,
    /// `FI`: aborted on purpose.
    FaultInjected,
    /// `RL`: over a rate limit.
    RateLimited,
    /// `UAEX`: refused by an external authorizer.
    UnauthorizedExternal,
    /// `RLSE`: the rate limit service failed.
    RateLimitServiceError,
    /// `DC`: the client went away.
    DownstreamConnectionTermination,
    /// `URX`: tries are used up.
    RetryLimitExceeded,
    /// `SI`: nothing happened for too long.
    StreamIdleTimeout,
    /// `IH`: a header with an invalid value.
    InvalidHeader,
    /// `DPE`: the client broke the protocol.
    DownstreamProtocolError,
    /// `UMSDR`: the longest duration of a stream was reached.
    MaxDuration,
    /// `NFCF`: no filter configuration.
    NoFilterConfig,
    /// `DT`: the longest duration of a connection was reached.
    DurationTimeout,
    /// `UPE`: the backend broke the protocol.
    UpstreamProtocolError,
    /// `NC`: the route's backend is not known.
    NoCluster,
    /// `OM`: refused for lack of memory or capacity.
    Overload,
    /// `DF`: a name could not be resolved.
    DnsFailure,
    /// `DO`: dropped by the overload manager.
    DropOverload,
    /// `DR`: reset by the client.
    DownstreamRemoteReset,
}

impl Flag {
    /// All, in order.
    pub const ALL: [Self; 28] = [
        Self::LocalHealthCheck,
        Self::NoHealthyUpstream,
        Self::UpstreamRequestTimeout,
        Self::LocalReset,
        Self::UpstreamRemoteReset,
        Self::UpstreamConnectionFailure,
        Self::UpstreamConnectionTermination,
        Self::UpstreamOverflow,
        Self::NoRoute,
        Self::DelayInjected,
        Self::FaultInjected,
        Self::RateLimited,
        Self::UnauthorizedExternal,
        Self::RateLimitServiceError,
        Self::DownstreamConnectionTermination,
        Self::RetryLimitExceeded,
        Self::StreamIdleTimeout,
        Self::InvalidHeader,
        Self::DownstreamProtocolError,
        Self::MaxDuration,
        Self::NoFilterConfig,
        Self::DurationTimeout,
        Self::UpstreamProtocolError,
        Self::NoCluster,
        Self::Overload,
        Self::DnsFailure,
        Self::DropOverload,
        Self::DownstreamRemoteReset,
    ];

    /// The letters.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::LocalHealthCheck => "LH",
            Self::NoHealthyUpstream => "UH",
            Self::UpstreamRequestTimeout => "UT",
            Self::LocalReset => "LR",
            Self::UpstreamRemoteReset => "UR",
            Self::UpstreamConnectionFailure => "UF",
            Self::UpstreamConnectionTermination => "UC",
            Self::UpstreamOverflow => "UO",
            Self::NoRoute => "NR",
            Self::DelayInjected => "DI",
            Self::FaultInjected => "FI",
            Self::RateLimited => "RL",
            Self::UnauthorizedExternal => "UAEX",
            Self::RateLimitServiceError => "RLSE",
            Self::DownstreamConnectionTermination => "DC",
            Self::RetryLimitExceeded => "URX",
            Self::StreamIdleTimeout => "SI",
            Self::InvalidHeader => "IH",
            Self::DownstreamProtocolError => "DPE",
            Self::MaxDuration => "UMSDR",
            Self::NoFilterConfig => "NFCF",
            Self::DurationTimeout => "DT",
            Self::UpstreamProtocolError => "UPE",
            Self::NoCluster => "NC",
            Self::Overload => "OM",
            Self::DnsFailure => "DF",
            Self::DropOverload => "DO",
            Self::DownstreamRemoteReset => "DR",
        }
    }

    fn bit(self) -> u32 {
        1 << (self as u32)
    }
}

/// A set of flags. Shown as the letters with commas between, or `-`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Flags(u32);

impl Flags {
    /// Adds one.
    pub fn insert(&mut self, flag: Flag) {
        self.0 |= flag.bit();
    }

    /// Adds all of `other`.
    pub fn merge(&mut self, other: Self) {
        self.0 |= other.0;
    }

    /// Whether it is there.
    pub fn contains(self, flag: Flag) -> bool {
        self.0 & flag.bit() != 0
    }

    /// Whether there is none.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// A number that tells sets apart, for CEL's `response.flags`.
    pub fn bits(self) -> u32 {
        self.0
    }
}

impl From<Flag> for Flags {
    fn from(flag: Flag) -> Self {
        Self(flag.bit())
    }
}

impl fmt::Display for Flags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut separator = "";
        for flag in Flag::ALL.into_iter().filter(|flag| self.contains(*flag)) {
            write!(f, "{separator}{}", flag.as_str())?;
            separator = ",";
        }
        if self.is_empty() {
            f.write_str("-")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_listed_in_order() {
        let mut flags = Flags::default();
        assert_eq!(flags.to_string(), "-");
        flags.insert(Flag::RetryLimitExceeded);
        flags.insert(Flag::UpstreamConnectionFailure);
        flags.insert(Flag::RetryLimitExceeded);
        assert_eq!(flags.to_string(), "UF,URX");
    }

    #[test]
    fn each_flag_has_a_bit_and_letters_of_its_own() {
        let mut letters: Vec<_> = Flag::ALL.iter().map(|flag| flag.as_str()).collect();
        letters.sort_unstable();
        letters.dedup();
        assert_eq!(letters.len(), Flag::ALL.len());
        for (at, flag) in Flag::ALL.into_iter().enumerate() {
            assert_eq!(flag as usize, at);
        }
    }
}
