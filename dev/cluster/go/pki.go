package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// Ten years: the cluster is made anew far more often, and a demo must not fail for a date.
const validity = 10 * 365 * 24 * time.Hour

type authority struct {
	certificate *x509.Certificate
	key         *ecdsa.PrivateKey
	folder      string
}

// runPKI writes a certificate authority and one certificate per argument into a folder:
//
//	pki FOLDER NAME=COMMON-NAME[/ORGANIZATION][@HOST-OR-ADDRESS,...] ...
//
// Every certificate serves both as a client's and, for its hosts, as a server's. `service-accounts.key` signs the
// tokens of service accounts.
func runPKI() int {
	if len(os.Args) < 2 {
		fmt.Fprintln(os.Stderr, "usage: pki FOLDER NAME=COMMON-NAME[/ORGANIZATION][@HOST,...] ...")
		return 2
	}
	if err := writePKI(os.Args[1], os.Args[2:]); err != nil {
		fmt.Fprintln(os.Stderr, "pki:", err)
		return 1
	}
	return 0
}

func writePKI(folder string, requests []string) error {
	if err := os.MkdirAll(folder, 0o700); err != nil {
		return err
	}
	ca, err := newAuthority(folder)
	if err != nil {
		return err
	}
	for _, request := range requests {
		if err := ca.issue(request); err != nil {
			return fmt.Errorf("%s: %w", request, err)
		}
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	return writeKey(filepath.Join(folder, "service-accounts.key"), key)
}

func newAuthority(folder string) (*authority, error) {
	template, err := newTemplate("lockstep-cluster")
	if err != nil {
		return nil, err
	}
	template.IsCA, template.BasicConstraintsValid = true, true
	template.KeyUsage |= x509.KeyUsageCertSign
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	ca := &authority{template, key, folder}
	return ca, ca.sign("ca", template, key)
}

func (ca *authority) issue(request string) error {
	name, subject, ok := strings.Cut(request, "=")
	if !ok {
		return fmt.Errorf("no '=' between name and subject")
	}
	subject, hosts, _ := strings.Cut(subject, "@")
	commonName, organization, _ := strings.Cut(subject, "/")
	template, err := newTemplate(commonName)
	if err != nil {
		return err
	}
	if organization != "" {
		template.Subject.Organization = []string{organization}
	}
	template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth}
	for _, host := range strings.FieldsFunc(hosts, func(r rune) bool { return r == ',' }) {
		if address := net.ParseIP(host); address != nil {
			template.IPAddresses = append(template.IPAddresses, address)
		} else {
			template.DNSNames = append(template.DNSNames, host)
		}
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	return ca.sign(name, template, key)
}

func (ca *authority) sign(name string, template *x509.Certificate, key *ecdsa.PrivateKey) error {
	der, err := x509.CreateCertificate(rand.Reader, template, ca.certificate, &key.PublicKey, ca.key)
	if err != nil {
		return err
	}
	if err := writePEM(filepath.Join(ca.folder, name+".crt"), "CERTIFICATE", der); err != nil {
		return err
	}
	return writeKey(filepath.Join(ca.folder, name+".key"), key)
}

func newTemplate(commonName string) (*x509.Certificate, error) {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		return nil, err
	}
	now := time.Now()
	return &x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{CommonName: commonName},
		NotBefore:    now.Add(-time.Hour), // a clock set back by a little must not break the cluster
		NotAfter:     now.Add(validity),
		KeyUsage:     x509.KeyUsageDigitalSignature,
	}, nil
}

func writeKey(path string, key *ecdsa.PrivateKey) error {
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return err
	}
	return writePEM(path, "EC PRIVATE KEY", der)
}

func writePEM(path, kind string, der []byte) error {
	return os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600)
}
