//! The families by name, and sets of them.

/// One of the families.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Metric {
    Requests,
    Duration,
    RequestBytes,
    ResponseBytes,
    RequestMessages,
    ResponseMessages,
}

impl Metric {
    pub(crate) const ALL: [Self; 6] = [
        Self::Requests,
        Self::Duration,
        Self::RequestBytes,
        Self::ResponseBytes,
        Self::RequestMessages,
        Self::ResponseMessages,
    ];

    /// The name as Prometheus shows it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Requests => "istio_requests_total",
            Self::Duration => "istio_request_duration_milliseconds",
            Self::RequestBytes => "istio_request_bytes",
            Self::ResponseBytes => "istio_response_bytes",
            Self::RequestMessages => "istio_request_messages_total",
            Self::ResponseMessages => "istio_response_messages_total",
        }
    }

    pub(super) fn help(self) -> &'static str {
        match self {
            Self::Requests => "Requests",
            Self::Duration => "From the head of the request to the end of the response",
            Self::RequestBytes => "Heads and bodies of requests",
            Self::ResponseBytes => "Heads and bodies of responses",
            Self::RequestMessages => "gRPC messages of clients",
            Self::ResponseMessages => "gRPC messages of backends",
        }
    }
}

/// A set of families.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Metrics(u8);

impl Metrics {
    /// All of them.
    #[cfg(test)]
    pub(crate) const ALL: Self = Self(0b11_1111);
    /// None of them.
    pub(crate) const NONE: Self = Self(0);

    pub(crate) fn with(self, metric: Metric) -> Self {
        Self(self.0 | 1 << (metric as u8))
    }

    pub(crate) fn contains(self, metric: Metric) -> bool {
        self.0 & 1 << (metric as u8) != 0
    }
}
