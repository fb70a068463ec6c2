//! What an approval changes of a request and of its response.

use http::{HeaderMap, HeaderName, HeaderValue, Uri, header, uri::PathAndQuery};

/// Changes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Edits {
    /// Of the request, in order.
    pub(crate) request: Vec<HeaderChange>,
    /// Taken out of the request.
    pub(crate) remove: Vec<HeaderName>,
    /// Of the response, in order.
    pub(crate) response: Vec<HeaderChange>,
    /// Query parameters that are set.
    pub(crate) set_query: Vec<(String, String)>,
    /// Query parameters that are taken out.
    pub(crate) remove_query: Vec<String>,
}

/// One header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct HeaderChange {
    pub(crate) name: HeaderName,
    pub(crate) value: HeaderValue,
    pub(crate) how: How,
}

/// How a header is changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum How {
    /// In the place of all values.
    Set,
    /// Beside them.
    Append,
    /// If there is none.
    AddIfAbsent,
    /// If there is one.
    SetIfPresent,
}

/// Framing and routing are never an authorizer's to change (RFC 9110, 7.6.1).
pub(super) fn may_change(name: &HeaderName) -> bool {
    const FIXED: [HeaderName; 8] = [
        header::CONNECTION,
        header::CONTENT_LENGTH,
        header::HOST,
        header::TE,
        header::TRAILER,
        header::TRANSFER_ENCODING,
        header::UPGRADE,
        header::PROXY_AUTHORIZATION,
    ];
    !FIXED.contains(name) && !matches!(name.as_str(), "keep-alive" | "proxy-connection")
}

/// Applies changes in order.
pub(crate) fn change(headers: &mut HeaderMap, changes: &[HeaderChange]) {
    for HeaderChange { name, value, how } in changes {
        let there = headers.contains_key(name);
        match how {
            How::Append => drop(headers.append(name, value.clone())),
            How::AddIfAbsent if there => {}
            How::SetIfPresent if !there => {}
            How::Set | How::AddIfAbsent | How::SetIfPresent => {
                drop(headers.insert(name, value.clone()));
            }
        }
    }
}

impl Edits {
    /// Changes a request.
    pub(crate) fn apply(&self, uri: &mut Uri, headers: &mut HeaderMap) {
        for name in &self.remove {
            headers.remove(name);
        }
        change(headers, &self.request);
        if !self.set_query.is_empty() || !self.remove_query.is_empty() {
            self.apply_query(uri);
        }
    }

    fn apply_query(&self, uri: &mut Uri) {
        let name = |pair: &str| pair.split('=').next().unwrap_or_default().to_owned();
        let gone = |pair: &&str| {
            let name = name(pair);
            self.remove_query.contains(&name) || self.set_query.iter().any(|it| it.0 == name)
        };
        let pairs = uri.query().unwrap_or_default().split('&');
        let kept = pairs.filter(|pair| !pair.is_empty() && !gone(pair));
        let mut pairs: Vec<String> = kept.map(str::to_owned).collect();
        let set = self.set_query.iter();
        pairs.extend(set.map(|(name, value)| format!("{name}={value}")));
        let text = match pairs.is_empty() {
            true => uri.path().to_owned(),
            false => format!("{}?{}", uri.path(), pairs.join("&")),
        };
        // What does not fit into a URI is not set.
        if let Ok(path) = PathAndQuery::try_from(text) {
            let mut parts = uri.clone().into_parts();
            parts.path_and_query = Some(path);
            if let Ok(new) = Uri::from_parts(parts) {
                *uri = new;
            }
        }
    }
}
