//! Which rule a request gets.

use http::{StatusCode, Uri, request::Parts, uri::PathAndQuery};
use mesh::l7::{
    config::Normalization, path, request::RequestFacts, response_flags::Flag, table::Selection,
};

use super::{exchange::Exchange, reply::Reply};

/// What is decided on. Before the head is known there is nothing to decide.
pub(super) fn facts<'a>(exchange: &'a Exchange, parts: &'a Parts) -> RequestFacts<'a> {
    let connection = &exchange.connection;
    let head = exchange.head.as_ref();
    RequestFacts {
        connection: connection.facts(&exchange.snapshot, None),
        method: &parts.method,
        scheme: head.map_or("http", |it| it.scheme),
        authority: head.map_or("", |it| it.authority.as_str()),
        path: parts.uri.path(),
        query: parts.uri.query(),
        headers: &parts.headers,
        remote: connection.client.ip(),
        claims: exchange.claims.as_deref(),
        http2: parts.version == http::Version::HTTP_2,
    }
}

/// Normalises the path: what is matched is what is forwarded.
///
/// # Errors
/// The answer to a path that no request may have.
pub(super) fn normalize(exchange: &Exchange, parts: &mut Parts) -> Result<(), Box<Reply>> {
    let config = exchange.snapshot.l7.config();
    let how = config.map_or(Normalization::default(), |it| it.normalization);
    let refused = |_| {
        let reply = Reply::new(StatusCode::BAD_REQUEST, "path_normalization_failed");
        Box::new(reply.flag(Flag::DownstreamProtocolError))
    };
    let changed = match path::normalize(parts.uri.path(), how) {
        Ok(std::borrow::Cow::Borrowed(same)) if same.len() == parts.uri.path().len() => {
            return Ok(());
        }
        Ok(changed) => changed.into_owned(),
        Err(error) => return Err(refused(error)),
    };
    set_path(parts, &changed).map_err(|_| refused(path::InvalidPath::Character))
}

/// Gives a request another path; its query stays.
///
/// # Errors
/// If it is not one.
pub(super) fn set_path(parts: &mut Parts, path: &str) -> Result<(), http::Error> {
    let target = match parts.uri.query() {
        Some(query) => PathAndQuery::try_from(format!("{path}?{query}"))?,
        None => PathAndQuery::try_from(path)?,
    };
    let mut uri = std::mem::take(&mut parts.uri).into_parts();
    uri.path_and_query = Some(target);
    parts.uri = Uri::from_parts(uri)?;
    Ok(())
}

/// Selects the rule.
///
/// # Errors
/// The answer to a request that no rule of its service matches.
pub(super) fn select(exchange: &mut Exchange, parts: &Parts) -> Result<(), Box<Reply>> {
    let selection = exchange.snapshot.l7.select(&facts(exchange, parts));
    match selection {
        Selection::NoRoutes => exchange.route = None,
        Selection::Rule(selected) => exchange.route = Some(selected),
        Selection::NoMatch => {
            let reply = Reply::new(StatusCode::NOT_FOUND, "route_not_found");
            return Err(Box::new(reply.flag(Flag::NoRoute)));
        }
    }
    Ok(())
}
