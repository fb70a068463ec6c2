//! Has the program built again when a file of the chart that it holds comes or goes.

fn main() {
    println!("cargo::rerun-if-changed=../deploy/charts/leyline");
}
