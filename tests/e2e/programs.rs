//! Any program of the machine can be a pod.

use anyhow::{Context, Result};
use rig::{
    holds,
    yaml::{pod, service_of},
};

use crate::scene::{Scene, Shop};

fn service(name: &str, port: u16) -> String {
    service_of("shop", name, name, &format!("name: tcp, port: {port}"))
}

#[test]
fn a_web_server_and_redis_work_in_the_mesh() -> Result<()> {
    let web = "[python3, -m, http.server, '8080', --directory, /usr/share/common-licenses]";
    let redis = "[redis-server, --save, '', --protected-mode, 'no', --port, '6379']";
    let yaml = [
        pod("shop", "web", "node2", web),
        service("web", 8080),
        pod("shop", "redis", "node2", redis),
        service("redis", 6379),
    ];
    let scene = Scene::start(Shop::InMesh, &yaml.concat())?;
    let fetch = "import urllib.request as u; print(u.urlopen('http://web.shop:8080/Apache-2.0').read().decode())";
    let page = scene.mesh.eventually("the page arrives", || {
        scene.mesh.succeed("shop/client", &["python3", "-c", fetch])
    });
    holds(&page, "TERMS AND CONDITIONS")?;
    let redis = |words: &[&str]| {
        scene.mesh.succeed(
            "shop/client",
            &[&["redis-cli", "-h", "redis.shop"], words].concat(),
        )
    };
    scene
        .mesh
        .eventually("redis answers", || holds(&redis(&["ping"])?, "PONG"));
    redis(&["set", "mesh", "leyline"])?;
    holds(&redis(&["get", "mesh"])?, "leyline")?;
    scene.access_line("node2", &["ns/shop/sa/redis", "direction=\"inbound\""]);
    Ok(())
}

#[test]
fn postgres_works_in_the_mesh() -> Result<()> {
    let programs = std::fs::read_dir("/usr/lib/postgresql").context("PostgreSQL is installed")?;
    let version = programs
        .flatten()
        .next()
        .context("a version of PostgreSQL")?
        .path();
    let run = format!(
        "[sh, -c, 'd=$(mktemp -d) && {0}/bin/initdb -D $d/data -A trust >/dev/null && \
         echo \"host all all all trust\" >> $d/data/pg_hba.conf && \
         exec {0}/bin/postgres -D $d/data -k $d -h 0.0.0.0']",
        version.display()
    );
    let yaml = [
        pod("shop", "database", "node2", &run),
        service("database", 5432),
    ];
    let scene = Scene::start(Shop::InMesh, &yaml.concat())?;
    let ask = "select 6 * 7";
    let query = [
        "sh",
        "-c",
        &format!("PGUSER=$(whoami || echo pod) psql -h database.shop -d postgres -Atc '{ask}'"),
    ];
    let answer = scene.mesh.eventually("the database answers", || {
        scene.mesh.succeed("shop/client", &query)
    });
    holds(&answer, "42")?;
    scene.access_line(
        "node2",
        &[
            "ns/shop/sa/database",
            "ns/shop/sa/client",
            "direction=\"inbound\"",
        ],
    );
    Ok(())
}
