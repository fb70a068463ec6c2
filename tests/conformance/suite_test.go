// Package conformance runs the Gateway API's own conformance suite against the cluster that KUBECONFIG names: its profiles for
// meshes, with every feature that they know. It is built as a program (go test -c), and started by the rig (tests/src/cluster).
package conformance

import (
	"flag"
	"io/fs"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"sigs.k8s.io/gateway-api/conformance"
	confv1 "sigs.k8s.io/gateway-api/conformance/apis/v1"
	"sigs.k8s.io/gateway-api/conformance/tests"
	"sigs.k8s.io/gateway-api/conformance/utils/suite"
	"sigs.k8s.io/gateway-api/pkg/features"
	"sigs.k8s.io/yaml"
)

var (
	only   = flag.String("only", "", "run these tests alone (short names, with commas between)")
	report = flag.String("report", "", "where the report goes")
	image  = flag.String("image", "leyline.dev/echo:dev", "the image of the suite's echo server, as the cluster has it")
	class  = flag.String("class", "leyline-waypoint", "the GatewayClass of waypoints")
	named  = flag.String("implementation-version", "dev", "the version that the report names")
)

// What a namespace of the suite gets: its pods are in the mesh, and its services have a waypoint.
var labels = map[string]string{
	"istio.io/dataplane-mode": "ambient",
	"istio.io/use-waypoint":   "waypoint",
}

func TestConformance(t *testing.T) {
	options := conformance.DefaultOptions(t)
	options.NamespaceLabels = labels
	options.ConformanceProfiles = []suite.ConformanceProfileName{
		suite.MeshHTTPConformanceProfileName,
		suite.MeshGRPCConformanceProfileName,
	}
	options.SupportedFeatures = supported()
	options.ManifestFS = []fs.FS{manifests{conformance.Manifests}}
	options.Implementation = confv1.Implementation{
		Organization: "leyline",
		Project:      "leyline",
		URL:          "leyline.dev",
		Version:      *named,
		Contact:      []string{"leyline.dev"},
	}
	run, err := suite.NewConformanceTestSuite(options)
	if err != nil {
		t.Fatalf("make the suite: %v", err)
	}
	// The suite sets it only where it tests gateways.
	run.Applier.GatewayClass = *class
	chosen := choose(t)
	run.Setup(t, chosen)
	// The suite counts as running until its own clean-up, which comes before this one.
	if *report != "" {
		t.Cleanup(func() { write(t, run) })
	}
	if err := run.Run(t, chosen); err != nil {
		t.Errorf("run the suite: %v", err)
	}
}

// supported is every feature of meshes, core and extended, and whatever else the suite's tests of meshes ask for.
func supported() []features.FeatureName {
	all := features.SetsToNamesSet(features.MeshCoreFeatures, features.MeshExtendedFeatures)
	all.Insert(features.SupportHTTPRoute, features.SupportGRPCRoute)
	for _, test := range tests.ConformanceTests {
		if slices.Contains(test.Features, features.SupportMesh) {
			all.Insert(test.Features...)
		}
	}
	return all.UnsortedList()
}

// choose is the suite's tests for meshes, or those of them that were asked for.
func choose(t *testing.T) []suite.ConformanceTest {
	names := strings.FieldsFunc(*only, func(r rune) bool { return r == ',' })
	var chosen []suite.ConformanceTest
	for _, test := range tests.ConformanceTests {
		wanted := len(names) == 0 || slices.Contains(names, test.ShortName)
		if wanted && slices.Contains(test.Features, features.SupportMesh) {
			chosen = append(chosen, test)
		}
	}
	if len(names) > 0 && len(chosen) != len(names) {
		t.Fatalf("of %v, only %d are tests for meshes", names, len(chosen))
	}
	return chosen
}

func write(t *testing.T, run *suite.ConformanceTestSuite) {
	made, err := run.Report()
	if err != nil {
		t.Fatalf("make the report: %v", err)
	}
	text, err := yaml.Marshal(made)
	if err != nil {
		t.Fatalf("write the report: %v", err)
	}
	if err := os.WriteFile(*report, text, 0o644); err != nil {
		t.Fatalf("write the report: %v", err)
	}
}

// manifests are the suite's own, with two changes: the image is the one that the cluster has, and each namespace of the mesh
// has the waypoint that its label names.
type manifests struct{ fs.FS }

const mesh = "mesh/manifests.yaml"

var echo = regexp.MustCompile(`image: \S+/echo-advanced:\S+`)

const waypoint = `
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: waypoint, namespace: NAMESPACE, labels: {istio.io/waypoint-for: service}}
spec:
  gatewayClassName: set-by-the-suite
  listeners: [{name: mesh, port: 15008, protocol: HBONE}]
`

// ReadFile is how the suite reads a manifest.
func (m manifests) ReadFile(name string) ([]byte, error) {
	text, err := fs.ReadFile(m.FS, name)
	if err != nil || name != mesh {
		return text, err
	}
	text = echo.ReplaceAll(text, []byte("image: "+*image))
	for _, namespace := range []string{suite.MeshNamespace, suite.MeshConsumerNamespace} {
		text = append(text, strings.ReplaceAll(waypoint, "NAMESPACE", namespace)...)
	}
	return text, nil
}
